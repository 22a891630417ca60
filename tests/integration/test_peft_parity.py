"""Acceptance: the same initial A and B and the same data give the losses of PEFT, step for step, in fp32."""

import copy
import math
import re

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, LoRAConfig, inject_adapters

peft = pytest.importorskip("peft", reason="the comparison needs peft")
transformers = pytest.importorskip("transformers", reason="the comparison needs a transformers model")

STEPS = 50
TOLERANCE = 1e-5
# A random base drawn as narrowly as for pretraining computes next to nothing that adapters could use, and
# Adam on its tiny gradients is chaotic: rounding alone would drive two equal runs apart.
WIDE = 0.1
# PEFT asks transformers by the old name of a property.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def tiny_llama():
    config = transformers.LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=101,
        max_position_embeddings=64,
        initializer_range=WIDE,
        use_cache=False,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def tiny_gpt2():
    config = transformers.GPT2Config(
        n_embd=48,
        n_layer=2,
        n_head=4,
        vocab_size=101,
        n_positions=64,
        initializer_range=WIDE,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


@pytest.fixture(autouse=True)
def one_thread():
    """These tensors are far too small to share between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2_LINEARS = ["c_attn", "c_proj", "c_fc"]

CASES = {
    "alpha twice the rank": (tiny_llama, LLAMA_LINEARS, {"rank": 8, "alpha": 16}),
    "alpha not a multiple of the rank": (tiny_llama, LLAMA_LINEARS, {"rank": 6, "alpha": 11}),
    "rank-stabilised": (tiny_llama, LLAMA_LINEARS, {"rank": 8, "alpha": 16, "rank_stabilized": True}),
    "query and value only": (tiny_llama, ["q_proj", "v_proj"], {"rank": 4, "alpha": 4}),
    "rank and alpha by pattern": (
        tiny_llama,
        LLAMA_LINEARS,
        {"rank": 4, "alpha": 8, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 32}},
    ),
    "Conv1D of GPT-2": (tiny_gpt2, GPT2_LINEARS, {"rank": 8, "alpha": 16}),
    "Conv1D, rank-stabilised": (tiny_gpt2, GPT2_LINEARS, {"rank": 8, "alpha": 16, "rank_stabilized": True}),
}


def batches(*, vocabulary=101):
    """Fifty batches, of eight different ones: counting in steps of one to three."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(vocabulary, (8, 4, 1), generator=generator)
    strides = torch.randint(1, 4, (8, 4, 1), generator=generator)
    different = (starts + strides * torch.arange(24)) % vocabulary
    return [different[step % 8] for step in range(STEPS)]


def peft_model(base, targets, settings):
    config = peft.LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        use_rslora=settings.get("rank_stabilized", False),
        rank_pattern=settings.get("rank_pattern", {}),
        alpha_pattern=settings.get("alpha_pattern", {}),
        target_modules=targets,
        fan_in_fan_out=isinstance(base, transformers.GPT2LMHeadModel),
        lora_dropout=0.0,
    )
    return peft.get_peft_model(copy.deepcopy(base), config)


def peft_tensors(model):
    key = re.compile(r"base_model\.model\.(.+)\.(lora_[AB])\.default\.weight")
    found = ((key.fullmatch(name), parameter) for name, parameter in model.named_parameters())
    return {match.groups(): parameter for match, parameter in found if match}


def draw_B(model, *, deviation):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for (_, factor), parameter in peft_tensors(model).items():
            if factor == "lora_B":
                parameter.copy_(deviation * torch.randn(parameter.shape, generator=generator))


def copy_initial(source, target, *, prefix=""):
    """Put the A and B in ``source``, by (layer, factor), into our adapters; every one must find its place."""
    ours = {name: p for name, p in target.named_parameters() if ".adapters." in name}
    expected = {f"{prefix}{layer}.adapters.default.{factor}": value for (layer, factor), value in source.items()}
    assert ours.keys() == expected.keys()
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(expected[name])


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.01)


def train(model, data):
    optimizer = optimizer_of(model)
    losses = []
    for tokens in data:
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def largest_difference(ours, theirs):
    assert len(ours) == len(theirs) == STEPS
    assert all(math.isfinite(loss) for loss in ours)
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("start", ["B zero", "B drawn"])
@pytest.mark.parametrize("case", CASES)
def test_fifty_steps_have_the_losses_of_peft(case, start):
    build, targets, settings = CASES[case]
    base = build()
    theirs = peft_model(base, targets, settings).train()
    if start == "B drawn":
        draw_B(theirs, deviation=0.02)
    ours = copy.deepcopy(base).train()
    inject_adapters(ours, LoRAConfig(target_modules=targets, **settings))
    copy_initial(peft_tensors(theirs), ours)

    their_losses, our_losses = train(theirs, batches()), train(ours, batches())

    difference = largest_difference(our_losses, their_losses)
    print(f"\n{case}, {start}: largest relative difference of {STEPS} losses {difference:.2e}")
    with torch.no_grad():
        untrained = base(input_ids=batches()[-1], labels=batches()[-1]).loss.item()
    assert their_losses[-1] < 0.95 * untrained, "next to nothing was learnt, so the comparison shows nothing"
    assert difference <= TOLERANCE
    for (layer, factor), expected in peft_tensors(theirs).items():
        trained = ours.get_parameter(f"{layer}.adapters.default.{factor}")
        torch.testing.assert_close(trained, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", ["rank-stabilised", "Conv1D, rank-stabilised"])
def test_large_updates_agree_in_double_precision(case):
    """In fp32 a wild run amplifies rounding beyond any tolerance; here it shows that the arithmetic is equal."""
    build, targets, settings = CASES[case]
    base = build().double()
    theirs = peft_model(base, targets, settings).train()
    draw_B(theirs, deviation=0.1)
    ours = copy.deepcopy(base).train()
    inject_adapters(ours, LoRAConfig(target_modules=targets, **settings))
    copy_initial(peft_tensors(theirs), ours)

    difference = largest_difference(train(ours, batches()), train(theirs, batches()))

    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float64}
    print(f"\n{case}, fp64: largest relative difference of {STEPS} losses {difference:.2e}")
    assert difference <= 1e-6  # transformers computes the loss itself in fp32
    for (layer, factor), expected in peft_tensors(theirs).items():
        trained = ours.get_parameter(f"{layer}.adapters.default.{factor}")
        torch.testing.assert_close(trained, expected, rtol=1e-6, atol=1e-6)


class Language(L.LightningModule):
    """Knows nothing of adapters, neither ours nor PEFT's."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.losses = []

    def training_step(self, tokens, index):
        loss = self.model(input_ids=tokens, labels=tokens).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return optimizer_of(self)


class StartFrom(L.Callback):
    def __init__(self, tensors):
        self.tensors = {key: value.detach().clone() for key, value in tensors.items()}

    def on_fit_start(self, trainer, pl_module):
        copy_initial(self.tensors, pl_module, prefix="model.")


def test_the_callback_in_a_trainer_has_the_losses_of_plain_lightning_around_a_peft_model():
    def fit(module, *callbacks):
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=1,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module.train(), DataLoader(batches(), batch_size=None))
        return module.losses

    base, settings = tiny_llama(), {"rank": 8, "alpha": 16}
    theirs = peft_model(base, LLAMA_LINEARS, settings)
    start = StartFrom(peft_tensors(theirs))
    callback = LoRACallback(LoRAConfig(target_modules="all-linear", **settings))
    our_losses = fit(Language(copy.deepcopy(base)), callback, start)
    their_losses = fit(Language(theirs))

    difference = largest_difference(our_losses, their_losses)
    print(f"\nTrainer: largest relative difference of {STEPS} losses {difference:.2e}")
    assert difference <= TOLERANCE
