"""Which blocks "auto" finds."""

from __future__ import annotations

import itertools

import pytest
from torch import nn

from lightning_lora import LoRAConfig, inject_adapters
from lightning_lora.gradient_checkpointing.repeated import repeated_blocks
from tests.gradient_checkpointing.cases import Block, ResNet, llama, resnet_of_transformers, t5


def found(module: nn.Module) -> list[str]:
    return [name for name, _ in repeated_blocks(module)]


class Experts(nn.Module):
    """A block that holds a list of blocks of its own."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)
        self.experts = nn.ModuleList(Block(width) for _ in range(3))


class Stage(nn.Module):
    """A stage of a hierarchical vision model: blocks of one width."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.down = nn.Linear(width // 2, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))


class Holder(nn.Module):
    """Holds parts under names."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def chain(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())))


def test_layers_of_transformers_count_and_nothing_inside_them() -> None:
    assert found(llama(2)) == ["model.layers.0", "model.layers.1"]
    assert found(t5()) == ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]


def test_a_list_inside_blocks_is_no_list_of_blocks() -> None:
    module = Holder(layers=nn.ModuleList([Experts(), Experts()]))
    assert found(module) == ["layers.0", "layers.1"]


def test_blocks_that_only_some_hold_experts_are_still_blocks() -> None:
    first, second = Experts(), Experts()
    first.experts = Block(8)  # type: ignore[assignment]
    assert found(Holder(layers=nn.ModuleList([first, second]))) == ["layers.0", "layers.1"]


def test_of_stages_the_blocks_count() -> None:
    module = Holder(stages=nn.ModuleList([Stage(8, 2), Stage(16, 3)]))
    assert found(module) == [f"stages.{i}.blocks.{j}" for i, depth in enumerate((2, 3)) for j in range(depth)]
    assert found(ResNet()) == ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]
    layers = [f"resnet.encoder.stages.{i}.layers.{j}" for i in range(2) for j in range(2)]
    assert found(resnet_of_transformers()) == layers


def test_lists_of_lists_are_stages_whatever_their_shapes() -> None:
    module = nn.Sequential(nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block()))
    assert found(module) == ["0.0", "0.1", "1.0", "1.1"]


def test_a_stem_and_a_head_around_a_stack_are_no_blocks() -> None:
    stack = nn.Sequential(Block(8), Block(8))
    assert found(nn.Sequential(chain(4, 8), stack, chain(8, 8, 2))) == ["1.0", "1.1"]
    assert found(nn.Sequential(nn.Linear(4, 8), Block(8), Block(8), nn.Linear(8, 2))) == ["1", "2"]


def test_adapters_on_some_blocks_only_make_no_difference() -> None:
    module = Holder(layers=nn.ModuleList([Experts(), Experts()]))
    inject_adapters(module, LoRAConfig(rank=2, layers="last-half"))
    assert found(module) == ["layers.0", "layers.1"]


def test_lists_of_single_layers_and_of_modules_without_parameters_are_no_blocks() -> None:
    class Score(nn.Module):
        pass

    heads = nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 2)])
    assert found(Holder(heads=heads, scores=nn.ModuleList([Score(), Score()]))) == []


@pytest.mark.parametrize("adapted", [False, True])
def test_a_plain_mlp_is_one_block_where_there_is_another_of_its_kind_only(adapted: bool) -> None:
    module = Holder(encoder=chain(8, 4, 2), decoder=chain(2, 4, 8), head=nn.Linear(8, 8))
    if adapted:
        inject_adapters(module, LoRAConfig(rank=1))
    assert found(module) == ["encoder", "decoder"]
    assert found(Holder(head=chain(8, 8, 2), blocks=nn.ModuleList([Block(), Block()]))) == ["blocks.0", "blocks.1"]


def test_a_single_plain_chain_is_no_block_until_it_is_split() -> None:
    assert found(chain(4, 4, 4, 4, 4)) == []
    assert found(Holder(body=chain(4, 4, 4, 4, 4), head=nn.Linear(4, 2))) == []
    assert found(nn.Sequential(chain(4, 4, 4), chain(4, 4, 4))) == ["0", "1"]
