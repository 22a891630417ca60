"""Tiny real modules, each a stack of blocks, and what is measured on them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, inject_adapters
from lightning_lora.gradient_checkpointing import recomputed_blocks

Gradients = dict[str, Tensor | None]


class Case(NamedTuple):
    """One architecture: how to build it, how to call it, and how many blocks it has."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    blocks: int
    adapted: bool = True


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def llama(layers: int = 3, **options: Any) -> nn.Module:
    needs("transformers")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
        attention_dropout=0.1,
        **options,
    )
    return LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    needs("transformers")
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=32, n_positions=16))


def bert() -> nn.Module:
    needs("transformers")
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, vocab_size=32)
    )


def t5() -> nn.Module:
    needs("transformers")
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=32, decoder_start_token_id=0)
    )


def resnet_of_transformers() -> nn.Module:
    needs("transformers")
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic")
    return ResNetForImageClassification(config)


def vit_of_timm() -> nn.Module:
    needs("timm")
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=24, num_classes=4, drop_rate=0.1)


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` with a padding mask and a causal one."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        padding[0, -2:] = True
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]).bool()
        return self.encoder(x, mask=mask, src_key_padding_mask=padding)


class BasicBlock(nn.Module):
    """The block of ResNet-18 (He et al., 2015)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Identity() if width == out else nn.Sequential(nn.Conv2d(width, out, 1), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.down(x))


class ResNet(nn.Module):
    """Two stages of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.layer1 = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))
        self.layer2 = nn.Sequential(BasicBlock(8, 16), BasicBlock(16, 16))
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


class Block(nn.Module):
    """A residual block with dropout."""

    def __init__(self, width: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(width, 2 * width), nn.Dropout(dropout), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(torch.tanh(self.up(x))))


def stack(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), *(Block(dropout=dropout) for _ in range(4)), nn.Linear(16, 4))


def stack_of_chains() -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(3)))


def plain_chain() -> nn.Sequential:
    layers = [part for _ in range(4) for part in (nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.1))]
    return nn.Sequential(*layers)


class Autoencoder(nn.Module):
    """Two plain chains and nothing else that repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = plain_chain(), plain_chain()

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.decoder(self.encoder(input))
        return output


def tokens() -> Tensor:
    return torch.arange(16).reshape(2, 8)


def rows() -> dict[str, Any]:
    return {"input": torch.linspace(-1, 1, 40).reshape(5, 8)}


def images() -> Tensor:
    return torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)


CASES = {
    "llama": Case(llama, lambda: {"input_ids": tokens()}, 3),
    "gpt2": Case(gpt2, lambda: {"input_ids": tokens()}, 3),
    "bert": Case(bert, lambda: {"input_ids": tokens()}, 3),
    "t5": Case(t5, lambda: {"input_ids": tokens(), "labels": tokens()}, 4),
    "timm_vit": Case(vit_of_timm, lambda: {"x": images()}, 3),
    "encoder": Case(Encoder, lambda: {"x": torch.linspace(-1, 1, 192).reshape(2, 6, 16)}, 3),
    "resnet": Case(ResNet, lambda: {"x": images()}, 4, adapted=False),
    "transformers_resnet": Case(resnet_of_transformers, lambda: {"pixel_values": images()}, 4, adapted=False),
    "stack": Case(lambda: stack(0.1), rows, 4),
    "stack_of_chains": Case(stack_of_chains, rows, 3),
    "plain_chains": Case(Autoencoder, rows, 2),
}


def build(name: str, *, training: bool = True) -> nn.Module:
    """The module with adapters that act, always with the same values."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = CASES[name].build()
        if CASES[name].adapted:
            adapt(module)
    return module.train(training)


def adapt(module: nn.Module) -> nn.Module:
    inject_adapters(module, LoRAConfig(rank=2))
    for key, parameter in module.named_parameters():
        if key.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)  # a zero B would hide the gradients of A
    return module


def loss_of(output: Any) -> Tensor:
    """A number that depends on every element of the output unequally."""
    tensor = output if isinstance(output, Tensor) else output["logits"]
    return (tensor.float() * torch.linspace(-1, 1, tensor.numel(), device=tensor.device).view_as(tensor)).sum()


def call(module: nn.Module, inputs: dict[str, Any]) -> Any:
    # nn.Sequential names its only argument "input", which a patched forward may not be given by name.
    return module(*inputs.values()) if isinstance(module, nn.Sequential) else module(**inputs)


def gradients(module: nn.Module, inputs: dict[str, Any], *, autocast: bool = False, seed: int = 1) -> Gradients:
    """Of every trainable parameter, from one step with a fixed random stream."""
    module.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
        loss = loss_of(call(module, inputs))
    loss.backward()
    return {key: p.grad for key, p in module.named_parameters() if p.requires_grad}


def saved_bytes(module: nn.Module, inputs: dict[str, Any]) -> int:
    """Bytes of all storages that autograd holds after the forward pass, without those of the module itself."""
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call(module, inputs)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*module.parameters(), *module.buffers()]}
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    del output
    return sum(size for pointer, size in sizes.items() if pointer not in own)


class Calls:
    """How often each block ran in the forward pass and again in the backward pass, by its first inner module."""

    def __init__(self) -> None:
        self.forward: dict[str, int] = {}
        self.backward: dict[str, int] = {}
        self.in_backward = False


@contextmanager
def counted(module: nn.Module, names: list[str] | None = None) -> Iterator[Calls]:
    """Count the runs of the blocks called ``names``; default: those that are recomputed."""
    calls, first, handles = Calls(), {}, []

    def counter(block: str) -> Callable[..., None]:
        def count(inner: nn.Module, args: Any) -> None:
            if first.setdefault(block, inner) is inner:
                runs = calls.backward if calls.in_backward else calls.forward
                runs[block] = runs.get(block, 0) + 1

        return count

    for name in recomputed_blocks(module) if names is None else names:
        block = module.get_submodule(name)
        handles += [c.register_forward_pre_hook(counter(name)) for c in block.modules() if c is not block]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def recomputations(module: nn.Module, inputs: dict[str, Any], names: list[str] | None = None) -> dict[str, int]:
    """How often each block is run in the backward pass of one step."""
    with counted(module, names) as calls:
        loss = loss_of(call(module, inputs))
        calls.in_backward = True
        loss.backward()
    module.zero_grad()
    return calls.backward


def assert_recomputed(gradients: Gradients, others: Gradients) -> None:
    """Bitwise, where the machine's products allow it.

    ``torch.matmul`` is one large product for a tensor that requires grad, and a batch of small ones for another, as in
    a forward pass that will be run again. Where MKL does not know the CPU (AMD) the two round differently.
    """
    if MATMULS_AGREE:
        assert_same(gradients, others)
        return
    assert gradients.keys() == others.keys()
    for key, value in gradients.items():
        torch.testing.assert_close(value, others[key], rtol=1e-4, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


def _matmuls_agree() -> bool:
    drawn = torch.Generator().manual_seed(0)
    left, right = torch.randn(4, 6, 8, generator=drawn), torch.randn(4, 8, 6, generator=drawn)
    return torch.equal(torch.bmm(left, right), torch.stack([a @ b for a, b in zip(left, right, strict=True)]))


MATMULS_AGREE = _matmuls_agree()


def assert_same(gradients: Gradients, others: Gradients) -> None:
    """Bitwise."""
    assert gradients.keys() == others.keys()
    for key, value in gradients.items():
        other = others[key]
        assert (value is None) == (other is None), key
        if value is not None and other is not None:
            assert torch.equal(value, other), f"{key}: {(value - other).abs().max()}"
