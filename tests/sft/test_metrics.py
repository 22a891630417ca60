import pytest
import torch

from lightning_lora.sft.metrics import ExactMatch, FieldF1, ValidJSON, field_pairs, parse_object


def measured(metric, *columns):
    metric.update(*columns)
    return metric.compute().item()


@pytest.mark.parametrize(
    "text",
    [
        'Sure! {"a": 1}',
        '{"a": 1} Hope this helps.',
        '```json\n{"a": 1}\n```',
        '{"a": 1, "a": 2}',
        '{"a": NaN}',
        '{"a": 1',
        "[1, 2]",
        "7",
        "",
        "[" * 100_000,
    ],
)
def test_what_is_not_wholly_one_object_is_not_valid(text):
    assert parse_object(text) is None


def test_valid_json_is_the_share_of_objects():
    assert measured(ValidJSON(), ['{"a": 1}', " {} \n", "prose", "[1]"]) == 0.5


def test_exact_match_ignores_key_order_and_white_space_only():
    expected = ['{"a": 1, "b": ["x", "y"]}'] * 5
    answers = [
        '{"b": ["x","y"],\n "a": 1}',  # right
        '{"a": 1, "b": ["y", "x"]}',  # the order of a list counts
        '{"a": 1, "b": ["x", "y"], "c": null}',  # so does a key too many
        '{"a": true, "b": ["x", "y"]}',  # 1 is not true
        "no",
    ]
    assert measured(ExactMatch(), answers, expected) == pytest.approx(1 / 5)


def test_field_f1_by_hand():
    expected = ['{"a": "x", "b": ["p", "q"], "c": null}', '{"a": "y"}']
    answers = ['{"a": "x", "b": ["q", "r"], "c": "z"}', "prose"]
    # right: a=x, b=q. given: a, b, b, c = 4. expected: a, b, b, a = 4.
    assert measured(FieldF1(), answers, expected) == pytest.approx(2 * 2 / (4 + 4))


def test_field_f1_counts_repeated_elements():
    assert measured(FieldF1(), ['{"a": [1, 1]}'], ['{"a": [1]}']) == pytest.approx(2 / 3)


def test_nested_fields_are_told_apart_by_their_path():
    pairs = field_pairs({"slots": {"name": "x"}, "name": "x", "none": None, "empty": []})
    assert set(pairs) == {("slots.name", '"x"'), ("name", '"x"')}


@pytest.mark.parametrize("metric", [ValidJSON(), FieldF1(), ExactMatch()])
def test_an_unused_metric_is_zero_not_nan(metric):
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert metric.compute() == torch.tensor(0.0)


def test_scores_add_up_over_batches():
    answers, expected = ['{"a": 1}', '{"a": 2}', "x"], ['{"a": 1}', '{"a": 1}', '{"a": 1}']
    for kind in (FieldF1, ExactMatch):
        in_parts = kind()
        for answer, wanted in zip(answers, expected, strict=True):
            in_parts.update([answer], [wanted])
        assert in_parts.compute() == measured(kind(), answers, expected)
