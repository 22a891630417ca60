"""Which blocks a config means: patterns, every n-th, shared and nested ones."""

from __future__ import annotations

import pytest
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_lora.errors import TargetNotFoundError
from lightning_lora.gradient_checkpointing import (
    GradientCheckpointingConfig,
    enable_gradient_checkpointing,
    recomputed_blocks,
)
from tests.gradient_checkpointing.cases import CASES, Block, build, llama, plain_chain, recomputations, rows, stack, t5


def recomputed(module: nn.Module, **fields: object) -> tuple[str, ...]:
    report = enable_gradient_checkpointing(module, GradientCheckpointingConfig(**fields))  # type: ignore[arg-type]
    assert report.recomputed == tuple(recomputed_blocks(module))
    return report.recomputed


def test_every_second_block_from_the_first_one_is_recomputed() -> None:
    module = stack()
    report = enable_gradient_checkpointing(module, GradientCheckpointingConfig(every_n=2))
    assert report.recomputed == ("1", "3")
    assert recomputations(module, rows(), ["1", "2", "3", "4"]) == {"1": 1, "3": 1}
    assert "every_n" in report.blocks[1].how


def test_every_nth_block_is_the_one_that_transformers_would_choose() -> None:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers.PreTrainedModel, "activation_checkpointing_enable"):
        pytest.skip("transformers has every_n_layers since it calls this activation checkpointing")
    for make, n in ((lambda: llama(5), 2), (lambda: llama(5), 3), (t5, 3)):
        theirs, ours = make(), make()
        theirs.activation_checkpointing_enable(every_n_layers=n)
        chosen = [name for name, child in theirs.named_modules() if _is_layer(child) and child.gradient_checkpointing]
        assert list(recomputed(ours, every_n=n)) == chosen


def _is_layer(module: nn.Module) -> bool:
    return any(cls.__name__ == "GradientCheckpointingLayer" for cls in type(module).__mro__)


def test_patterns_name_blocks_by_the_one_rule() -> None:
    assert recomputed(llama(), blocks="layers.1") == ("model.layers.1",)
    assert recomputed(llama(), blocks=r"layers\.[12]") == ("model.layers.1", "model.layers.2")
    assert recomputed(llama(2), blocks="mlp") == ("model.layers.0.mlp", "model.layers.1.mlp")


def test_a_pattern_that_matches_a_list_means_its_entries() -> None:
    assert recomputed(llama(2), blocks="layers") == ("model.layers.0", "model.layers.1")


def test_of_blocks_inside_each_other_the_outermost_counts() -> None:
    module = llama(2)
    assert recomputed(module, blocks=("layers.*", "mlp", "self_attn")) == ("model.layers.0", "model.layers.1")
    assert recomputations(module, CASES["llama"].inputs()) == {"model.layers.0": 1, "model.layers.1": 1}


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(TargetNotFoundError, match=r"'layer\.0' matches no block. Closest: .*'layers\.0'"):
        recomputed(llama(), blocks=("layers.1", "layer.0"))


def test_a_pattern_that_matches_only_single_layers_is_refused() -> None:
    with pytest.raises(TargetNotFoundError, match="matches only single layers, such as"):
        recomputed(build("llama"), blocks="q_proj")


def test_a_module_without_repeated_blocks_is_refused_and_told_how_to_name_them() -> None:
    with pytest.raises(TargetNotFoundError, match=r"Block has no list of repeated blocks.*blocks=\("):
        enable_gradient_checkpointing(Block())


def test_one_chain_of_layers_is_refused_and_told_to_split_it() -> None:
    with pytest.raises(TargetNotFoundError, match=r"one long chain of layers, make several nn\.Sequential"):
        enable_gradient_checkpointing(plain_chain())


def test_an_error_leaves_what_was_there() -> None:
    module = stack()
    enable_gradient_checkpointing(module)
    with pytest.raises(TargetNotFoundError):
        recomputed(module, blocks="nothing")
    assert recomputed_blocks(module) == ["1", "2", "3", "4"]


def test_a_module_that_is_not_complete_is_taken_as_far_as_it_is() -> None:
    class Lazy(nn.Module):
        body: nn.Module | None = None

        def forward(self, input: Tensor) -> Tensor:
            assert self.body is not None
            output: Tensor = self.body(input)
            return output

    module, config = Lazy(), GradientCheckpointingConfig(blocks=("body.1", "head.1"))
    assert enable_gradient_checkpointing(module, strict=False) is None
    assert enable_gradient_checkpointing(module, config, strict=False) is None
    module.body = stack()
    assert enable_gradient_checkpointing(module, config, strict=False).recomputed == ("body.1",)  # type: ignore[union-attr]
    assert len(enable_gradient_checkpointing(module, strict=False).recomputed) == 4  # type: ignore[union-attr]
    with pytest.raises(TargetNotFoundError, match=r"head\.1"):
        enable_gradient_checkpointing(module, config)


def test_a_shared_block_is_one_block_and_recomputed_at_each_call() -> None:
    block = Block(8)
    module = nn.Sequential(block, Block(8), block)
    assert enable_gradient_checkpointing(module).recomputed == ("0", "1")
    assert recomputations(module, rows()) == {"0": 2, "1": 1}


def test_blocks_that_torch_wraps_already_are_left_to_it() -> None:
    module = nn.Sequential(checkpoint_wrapper(Block(8)), checkpoint_wrapper(Block(8)), Block(8), Block(8))
    report = enable_gradient_checkpointing(module)
    assert report.recomputed == ("2", "3")
    assert [row.how.startswith("left") for row in report.blocks] == [True, True, False, False]
    assert recomputations(module, rows(), ["0", "1", "2", "3"]) == dict.fromkeys("0123", 1)


def test_the_report_says_what_happens_to_each_block() -> None:
    import rich.console

    report = enable_gradient_checkpointing(stack(), GradientCheckpointingConfig(every_n=2, offload=True))
    assert report.summary == "2 of 4 blocks are recomputed in the backward pass"
    assert report.to_dict()["blocks"][0] == {"name": "1", "type": "Block", "how": "recomputed, inputs in CPU memory"}
    console = rich.console.Console(width=120, record=True, quiet=True)
    console.print(report)
