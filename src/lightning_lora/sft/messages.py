"""Made-up customer messages of a service company, with the ticket its staff would write.

A message is free text: greetings, asides, typos, odd casing, several machines or none named by serial, the
site or the contact left out. The ticket is strict JSON in the company's own terms, with the same six keys in
the same order every time::

    {"topic":"leak","urgency":"week","line":"AQUA","units":["KX-4821"],"site":"Leeds","contact":null}

The rules of the house, which a model has to learn from the examples alone:

* ``topic``: outage stands still, leak, noise, gauge measures wrongly, delivery, billing.
* ``urgency``: now at once, week within days, later no hurry, and later too where nothing is said.
* ``line``: AQUA pumps, AERO compressors, CRYO cooling, PYRO heating.
* ``units``: every serial in the order named, written ``KX-4821`` however the customer wrote it; ``[]`` where
  there is none.
* ``site``, ``contact``: names as proper names, ``null`` where the message has none.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass

from lightning_lora.sft.chat import Example, answer_json
from lightning_lora.sft.noise import casing_of, with_typo, write_serials
from lightning_lora.sft.values import (
    ASIDES,
    CONTACT_WORDINGS,
    GREETINGS,
    SIGN_OFFS,
    SITE_WORDINGS,
    UNIT_WORDINGS,
    person,
    serial,
    site,
)
from lightning_lora.sft.vocabulary import MACHINES, TOPICS, URGENCIES

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """What the company wants to know about a message, in its own terms."""

    topic: str
    urgency: str
    line: str
    units: tuple[str, ...]
    site: str | None
    contact: str | None

    def to_json(self) -> str:
        """Return the ticket as the one line of JSON that the company's systems read."""
        return answer_json(asdict(self))


def company_messages(split: str, size: int, *, seed: int = 0) -> list[Example]:
    """Write ``size`` different messages with their tickets.

    The same arguments give the same messages on every machine. Wordings, names, sites and serials of one
    split are in no other.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.
        size: How many messages.
        seed: Another seed writes other messages from the same wordings.

    Returns:
        The examples: ``text`` the message, ``answer`` the ticket.

    Raises:
        ValueError: ``split`` is unknown or ``size`` is negative.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; use one of {', '.join(SPLITS)}.")
    if size < 0:
        raise ValueError(f"size={size} is negative; ask for zero messages or more.")
    rng = random.Random(f"{split}-{seed}")
    messages: dict[str, Example] = {}
    while len(messages) < size:
        ticket, machine = _draw_ticket(rng, split)
        text = _write(rng, split, ticket, machine)
        messages.setdefault(text, Example(text=text, answer=ticket.to_json()))
    return list(messages.values())


def _draw_ticket(rng: random.Random, split: str) -> tuple[Ticket, str]:
    line = rng.choice(list(MACHINES))
    ticket = Ticket(
        units=tuple(serial(rng, split) for _ in range(rng.choices((0, 1, 2, 3), weights=(20, 50, 20, 10))[0])),
        line=line,
        topic=rng.choice(list(TOPICS)),
        urgency=rng.choice(list(URGENCIES)),
        site=site(rng, split) if rng.random() < 0.75 else None,
        contact=person(rng, split) if rng.random() < 0.65 else None,
    )
    return ticket, rng.choice(MACHINES[line].of(split))


def _write(rng: random.Random, split: str, ticket: Ticket, machine: str) -> str:
    """Word a ticket the way a customer might."""
    opening = _opening(rng, split, ticket)
    body = _body(rng, split, ticket)
    closing = _closing(rng, split, ticket)
    values = {
        "m": machine,
        "u": write_serials(rng, ticket.units),
        "s": ticket.site or "",
        "c": ticket.contact or "",
    }
    pieces = [_fill(rng, piece, values) for piece in (*opening, *body, *closing)]
    return casing_of(rng, _join(rng, pieces))


def _opening(rng: random.Random, split: str, ticket: Ticket) -> list[str]:
    return [rng.choice(GREETINGS.of(split))] if rng.random() < 0.5 else []


def _body(rng: random.Random, split: str, ticket: Ticket) -> list[str]:
    """The problem, with the place and the serials beside it or in sentences of their own, in any order."""
    problem = rng.choice(TOPICS[ticket.topic].of(split))
    others = []
    if ticket.site is not None:
        where = rng.choice(SITE_WORDINGS.of(split))
        if rng.random() < 0.6 and ":" not in where:
            problem = f"{problem} {where}"
        else:
            others.append(where)
    if ticket.units:
        which = rng.choice(UNIT_WORDINGS.of(split))
        if rng.random() < 0.4:
            problem = f"{problem}, {which}"
        else:
            others.append(which)
    if ticket.urgency != "later" or rng.random() < 0.65:  # what isn't urgent often goes without saying
        others.append(rng.choice(URGENCIES[ticket.urgency].of(split)))
    if rng.random() < 0.35:
        others.append(rng.choice(ASIDES.of(split)))
    rng.shuffle(others)
    return [problem, *others] if rng.random() < 0.75 else [*others, problem]


def _closing(rng: random.Random, split: str, ticket: Ticket) -> list[str]:
    if ticket.contact is not None:
        return [rng.choice(CONTACT_WORDINGS.of(split))]
    return [rng.choice(SIGN_OFFS.of(split))] if rng.random() < 0.4 else []


def _fill(rng: random.Random, piece: str, values: dict[str, str]) -> str:
    # Typos go into the wording before the values are put in: a misspelt name would have no right answer.
    return with_typo(rng, piece).format(**values)


def _join(rng: random.Random, pieces: list[str]) -> str:
    """Put the pieces together as sentences, lines, or a hasty string of clauses."""
    style = rng.choices(("sentences", "lines", "hasty"), weights=(6, 2, 2))[0]
    if style == "sentences":
        return " ".join(_sentence(piece) for piece in pieces)
    if style == "lines":
        return "\n".join(_sentence(piece) for piece in pieces)
    return ", ".join(pieces)


def _sentence(piece: str) -> str:
    ending = "" if piece.endswith((".", "!", "?", ":", ")")) else "."
    return piece[:1].upper() + piece[1:] + ending
