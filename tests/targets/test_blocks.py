"""``layers``: which blocks of which lists."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch import nn

from lightning_lora import LoRAConfig, TargetNotFoundError
from lightning_lora.targets import select_targets
from lightning_lora.targets.blocks import BlockLists
from tests.targets.architectures import build


class Stack(nn.Module):
    """``depth`` blocks with two linear layers each, and a linear layer outside."""

    def __init__(self, depth: int = 6) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4)}) for _ in range(depth))


def blocks_of(module: nn.Module, layers: Any, target: str = "q") -> list[int]:
    """Indices of the selected blocks."""
    selection = select_targets(module, LoRAConfig(target_modules=target, layers=layers))
    return [int(re.search(r"\.(\d+)\.", f".{t.name}.").group(1)) for t in selection.targets]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        (0, [0]),
        (5, [5]),
        (-1, [5]),
        (-6, [0]),
        ("3", [3]),
        (" 3 ", [3]),
        ("-2", [4]),
        ([0, -1], [0, 5]),
        ([4, 1, 1], [1, 4]),
        ("1-3", [1, 2, 3]),
        (" 1 - 3 ", [1, 2, 3]),
        ("2-2", [2]),
        ("0-5", [0, 1, 2, 3, 4, 5]),
        ("last-half", [3, 4, 5]),
        ("every-other", [0, 2, 4]),
        (["every-other", "4-5"], [0, 2, 4, 5]),
        (["last-half", 0, "-6"], [0, 3, 4, 5]),
    ],
)
def test_selects(layers: Any, wanted: list[int]) -> None:
    assert blocks_of(Stack(), layers) == wanted


@pytest.mark.parametrize(("depth", "wanted"), [(2, [1]), (3, [1, 2]), (5, [2, 3, 4]), (8, [4, 5, 6, 7])])
def test_the_last_half_of_an_odd_number_has_the_middle(depth: int, wanted: list[int]) -> None:
    assert blocks_of(Stack(depth), "last-half") == wanted


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (6, r"layers entry 6 selects no target layer; there is blocks with 6 blocks"),
        (-7, r"layers entry -7 selects no target layer"),
        ([0, 9], r"layers entry 9 selects no target layer"),
        ("4-6", r"layers entry '4-6' goes past the last block, which is number 5"),
        ("3-1", r"layers entry '3-1' is not understood: use an index, an inclusive range such as \"4-7\""),
        ("first-half", r"layers entry 'first-half' is not understood"),
        ("1,2", r"layers entry '1,2' is not understood"),
        ("1:3", r"layers entry '1:3' is not understood"),
        ("", r"layers entry '' is not understood"),
    ],
)
def test_refuses(layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blocks_of(Stack(), layers)


def test_layers_outside_the_blocks_are_left_out_and_say_why() -> None:
    selection = select_targets(Stack(), LoRAConfig(layers=0))
    assert [t.name for t in selection.targets] == ["blocks.0.q", "blocks.0.v"]
    assert selection.skipped["stem"] == "outside layers=[0]"
    assert selection.skipped["blocks.1.q"] == "outside layers=[0]"


def test_a_module_without_repeated_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="layers is set, but the module has no list of repeated blocks"):
        blocks_of(nn.ModuleDict({"q": nn.Linear(2, 2)}), 0)
    with pytest.raises(ValueError, match="no list of repeated blocks"):
        blocks_of(Stack(depth=1), 0)


def test_experts_inside_blocks_are_no_blocks() -> None:
    net = nn.ModuleDict(
        {
            "layers": nn.ModuleList(
                nn.ModuleDict({"experts": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(2, 2)}) for _ in range(5))})
                for _ in range(3)
            )
        }
    )
    selection = select_targets(net, LoRAConfig(target_modules="q", layers=1))
    assert [t.name for t in selection.targets] == [f"layers.1.experts.{i}.q" for i in range(5)]
    with pytest.raises(ValueError, match="layers entry 4 selects no target layer"):
        select_targets(net, LoRAConfig(target_modules="q", layers=4))


def test_a_chain_of_stem_stack_and_head_is_no_list_of_blocks() -> None:
    net = nn.ModuleDict({"model": nn.Sequential(nn.Linear(4, 4), Stack(4), nn.Linear(4, 2))})
    selection = select_targets(net, LoRAConfig(layers="last-half"))
    assert [t.name for t in selection.targets] == [f"model.1.blocks.{i}.{name}" for i in (2, 3) for name in "qv"]
    assert selection.skipped["model.2"] == "outside layers=['last-half']"


def test_a_chain_of_like_layers_is_one() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert [t.name for t in select_targets(net, LoRAConfig(layers=[0, -1])).targets] == ["0", "4"]


def test_every_block_list_is_counted_on_its_own() -> None:
    net = nn.ModuleDict({"encoder": Stack(4), "decoder": Stack(2)})
    selection = select_targets(net, LoRAConfig(target_modules="q", layers=-1))
    assert [t.name for t in selection.targets] == ["encoder.blocks.3.q", "decoder.blocks.1.q"]
    selection = select_targets(net, LoRAConfig(target_modules="q", layers="0-3"))
    assert len(selection.targets) == 6
    selection = select_targets(net, LoRAConfig(target_modules="q", layers=3))
    assert [t.name for t in selection.targets] == ["encoder.blocks.3.q"]


def test_only_blocks_with_targets_count_for_halves_but_indices_are_positions() -> None:
    net = nn.Module()
    net.layers = nn.ModuleList(nn.ModuleDict({"q" if i % 2 else "x": nn.Linear(2, 2)}) for i in range(8))
    assert blocks_of(net, "last-half") == [5, 7]
    assert blocks_of(net, 1) == [1]
    with pytest.raises(ValueError, match="layers entry 0 selects no target layer; there is layers with 8 blocks"):
        blocks_of(net, 0)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("llama", "model.layers.3.self_attn.q_proj"),
        ("gpt2", "transformer.h.1.attn.c_attn"),
        ("bert", "bert.encoder.layer.1.attention.self.query"),
        ("vit", "vit.layers.1.attention.q_proj"),
        ("timm naming", "blocks.1.attn.qkv"),
    ],
)
def test_blocks_of_real_architectures_are_found(name: str, wanted: str) -> None:
    selection = select_targets(build(name), LoRAConfig(layers=-1))
    names = [t.name for t in selection.targets]
    assert wanted in names
    assert len({re.search(r"\d+", n).group() for n in names}) == 1  # type: ignore[union-attr]


def test_encoder_and_decoder_of_t5_are_two_lists() -> None:
    names = [t.name for t in select_targets(build("t5"), LoRAConfig(layers=0)).targets]
    assert {".".join(name.split(".")[:3]) for name in names} == {"encoder.block.0", "decoder.block.0"}


def test_block_names_are_those_of_the_outermost_lists() -> None:
    net = Stack(2)
    assert BlockLists(net, ["stem", "blocks.0.q", "blocks.1.q"]).block_names == {"blocks.0", "blocks.1"}


def test_a_selection_by_layers_that_fits_nothing_is_no_silent_success() -> None:
    with pytest.raises((ValueError, TargetNotFoundError)):
        blocks_of(Stack(), 2, target="stem")
