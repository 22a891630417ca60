import json
import re

import pytest

from lightning_lora.sft import values, vocabulary
from lightning_lora.sft.messages import SPLITS, company_messages
from lightning_lora.sft.noise import with_typo, write_serials
from lightning_lora.sft.pools import Pool

SIZE = 300
KEYS = ["topic", "urgency", "line", "units", "site", "contact"]


def pools() -> dict[str, Pool]:
    """Every pool of wordings and values, by where it stands."""
    found = {f"values.{name}": value for name, value in vars(values).items() if isinstance(value, Pool)}
    for name in ("MACHINES", "TOPICS", "URGENCIES"):
        found |= {f"{name}.{term}": pool for term, pool in getattr(vocabulary, name).items()}
    return found


def tickets(split: str, *, seed: int = 0) -> list[dict]:
    return [json.loads(example.answer) for example in company_messages(split, SIZE, seed=seed)]


def named(split: str, key: str) -> set[str]:
    found = [ticket[key] for ticket in tickets(split)]
    return {item for value in found if value for item in (value if isinstance(value, list) else [value])}


def test_there_are_pools_for_every_part_of_a_message():
    assert len(pools()) == 11 + 4 + 6 + 3


@pytest.mark.parametrize("name", pools())
def test_no_wording_is_in_two_splits_or_twice_in_one(name):
    everything = [wording.lower() for split in SPLITS for wording in pools()[name].of(split)]
    assert len(everything) == len(set(everything))
    assert all(pools()[name].of(split) for split in SPLITS)


@pytest.mark.parametrize("terms", [vocabulary.MACHINES, vocabulary.TOPICS, vocabulary.URGENCIES])
def test_no_wording_stands_for_two_house_terms(terms):
    everything = [wording for pool in terms.values() for split in SPLITS for wording in pool.of(split)]
    assert len(everything) == len(set(everything))


@pytest.mark.parametrize("key", ["units", "site", "contact"])
def test_values_to_copy_are_disjoint_between_splits(key):
    train, validation, test = (named(split, key) for split in SPLITS)
    assert train
    assert validation
    assert test
    assert not train & test
    assert not train & validation
    assert not validation & test


def test_no_place_that_can_be_put_together_is_in_another_split():
    places = {
        split: {a + b for a in values._PLACE_STARTS.of(split) for b in values._PLACE_ENDS.of(split)}
        | set(values.SITES.of(split))
        for split in SPLITS
    }
    assert len(places["train"]) > 3000
    assert not places["train"] & (places["validation"] | places["test"])
    assert not places["validation"] & places["test"]


def test_no_message_is_in_two_splits_or_twice_in_one():
    texts = [example.text for split in SPLITS for example in company_messages(split, SIZE)]
    assert len(set(texts)) == len(texts) == 3 * SIZE


def test_the_same_seed_writes_the_same_messages_and_another_seed_others():
    assert company_messages("train", 50, seed=3) == company_messages("train", 50, seed=3)
    assert not set(company_messages("train", 50, seed=3)) & set(company_messages("train", 50, seed=4))


def test_fewer_messages_are_the_start_of_more():
    assert company_messages("test", 80)[:20] == company_messages("test", 20)


@pytest.mark.parametrize("split", SPLITS)
def test_every_ticket_has_the_six_keys_and_house_terms_only(split):
    for ticket in tickets(split):
        assert list(ticket) == KEYS
        assert ticket["line"] in vocabulary.MACHINES
        assert ticket["topic"] in vocabulary.TOPICS
        assert ticket["urgency"] in vocabulary.URGENCIES
        assert all(re.fullmatch(r"[A-Z]{2}-\d{4}", unit) for unit in ticket["units"])


@pytest.mark.parametrize("split", SPLITS)
def test_what_the_ticket_copies_stands_in_the_message(split):
    for example in company_messages(split, SIZE):
        ticket = json.loads(example.answer)
        text = example.text.lower()
        letters_and_digits = re.sub(r"[^a-z0-9]", "", text)
        assert all(unit.replace("-", "").lower() in letters_and_digits for unit in ticket["units"])
        assert (ticket["site"] or "").lower() in text
        assert (ticket["contact"] or "").lower() in text


def test_fields_are_missing_single_and_repeated():
    counts = [len(ticket["units"]) for ticket in tickets("train")]
    assert {0, 1, 2, 3} <= set(counts)
    assert any(ticket["site"] is None for ticket in tickets("train"))
    assert any(ticket["contact"] is None for ticket in tickets("train"))


def test_no_message_names_the_line_in_the_term_of_the_house():
    assert not [e.text for e in company_messages("test", SIZE) if re.search("aqua|aero|cryo|pyro", e.text.lower())]


def test_no_placeholder_is_left_in_a_message():
    assert not [example.text for example in company_messages("train", 1000) if re.search(r"[{}]", example.text)]


def test_a_typo_never_touches_a_placeholder():
    import random

    rng = random.Random(0)
    spoiled = {with_typo(rng, "the {m} keeps shaking, ask {c}", probability=1.0) for _ in range(100)}
    assert len(spoiled) > 3
    assert all("{m}" in text and "{c}" in text for text in spoiled)


def test_serials_are_listed_in_their_order():
    import random

    for seed in range(20):
        written = write_serials(random.Random(seed), ["KX-1234", "TV-5678", "RM-9012"])
        assert re.findall(r"\d{4}", written) == ["1234", "5678", "9012"]


@pytest.mark.parametrize(("split", "size"), [("dev", 1), ("train", -1)])
def test_an_unknown_split_or_a_negative_size_is_refused(split, size):
    with pytest.raises(ValueError, match=r"split=|size="):
        company_messages(split, size)
