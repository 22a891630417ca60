"""A plan says what a real run takes, leaves the module alone, and allocates nothing."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math

import bitsandbytes as bnb
import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from rich.console import Console
from torch import nn
from transformers import BatchEncoding

from lightning_lora import LoRAConfig, QuantizationConfig, inject_adapters
from lightning_lora.errors import UnsupportedSetupError
from lightning_lora.frozen_layer import FrozenLayer
from lightning_lora.fused import draw as draws
from lightning_lora.gradient_checkpointing import GradientCheckpointingConfig, enable_gradient_checkpointing
from lightning_lora.planning import TokenBatch, plan_memory
from lightning_lora.planning.batches import example_of, resized
from lightning_lora.quantized_layer import QuantizedLayer
from tests.planning.models import llama, step_bytes, t5, tokens

LORA = LoRAConfig(rank=4)
NF4 = QuantizationConfig(quant_type="nf4", block_size=64)
FORMATS = (
    NF4,
    QuantizationConfig(double_quant=True),
    QuantizationConfig(quant_type="int8"),
    QuantizationConfig(quant_type="bf16"),
)


def step_of(plan):
    """What forward and backward add, without the batch, which is there before."""
    return sum(plan.step.backward.values()) - plan.step.backward.get("batch", 0)


def on_meta(build):
    with torch.device("meta"):
        return build()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("config", [LORA, LoRAConfig(rank=4, target_modules=["q_proj", "v_proj"])], ids=["all", "q+v"])
def test_a_step_takes_what_the_allocator_of_a_real_run_says(config, precision, recompute, monkeypatch):
    monkeypatch.setattr(draws, "is_emulated", lambda dtype: False)  # its blocks in fp32 are of this CPU alone
    plan = plan_memory(on_meta(llama), config, batch=(4, 64), precision=precision, gradient_checkpointing=recompute)
    module = llama().to(torch.bfloat16) if precision == "bf16-true" else llama()
    inject_adapters(module, config)
    if recompute:
        enable_gradient_checkpointing(module)
    ids = tokens(4, 64)

    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            return module(input_ids=ids, labels=ids).loss

    assert step_of(plan) == pytest.approx(step_bytes(module, loss), rel=0.05)
    casts = [child.cast_copy for child in module.modules() if isinstance(child, FrozenLayer) and child.cast_copy]
    assert plan.step.casts == sum(copy.kept.nbytes for copy in casts if copy.kept is not None)


@pytest.mark.parametrize("quantization", FORMATS, ids=lambda config: f"{config.quant_type}{config.double_quant}")
def test_a_quantized_base_takes_what_its_layers_really_hold(quantization):
    plan = plan_memory(on_meta(llama), LORA, batch=(2, 32), quantization=quantization)
    module = llama()
    inject_adapters(module, LORA, quantization=quantization)
    layers = dict(module.named_modules())
    codes = sum(layers[name].weight.nbytes for name in plan.base.quantized)
    constants = sum(t.nbytes for name in plan.base.quantized for t in layers[name].constants().values())
    tables = (
        0 if quantization.quant_type in ("int8", "bf16") else 4 * 16 + (4 * 256 + 4 if quantization.double_quant else 0)
    )
    assert plan.base.codes == codes
    assert plan.base.constants == constants + len(plan.base.quantized) * tables
    ids = tokens(2, 32)
    assert step_of(plan) == pytest.approx(step_bytes(module, lambda: module(input_ids=ids, labels=ids).loss), rel=0.05)


@pytest.mark.parametrize("build", [llama, t5])
def test_the_same_layers_stay_dense_as_in_a_real_injection(build):
    config = LoRAConfig(rank=4, modules_to_save=("lm_head",))
    skipping = QuantizationConfig(quant_type="int8", skip_modules=("q_proj",) if build is llama else ("q",))
    plan = plan_memory(on_meta(build), config, batch=(1, 8), quantization=skipping)
    module = build()
    inject_adapters(module, config, quantization=skipping)
    real = {name for name, child in module.named_modules() if isinstance(child, QuantizedLayer)}
    assert set(plan.base.quantized) == real
    assert "lm_head" in plan.base.kept_dense


def test_a_base_in_bf16_is_not_copied_for_products_in_bf16():
    bf16 = QuantizationConfig(quant_type="bf16")
    plan = plan_memory(on_meta(llama), LORA, batch=(2, 32), quantization=bf16, precision="bf16-mixed")
    assert "dequantized weights" not in plan.step.backward
    module = llama()
    inject_adapters(module, LORA, quantization=bf16)
    ids = tokens(2, 32)

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return module(input_ids=ids, labels=ids).loss

    assert step_of(plan) == pytest.approx(step_bytes(module, loss), rel=0.05)
    assert plan_memory(module, None, batch=(2, 32), precision="bf16-mixed").step == plan.step


def test_a_dequantized_weight_is_there_for_a_moment_only():
    """One wide layer: its dense copy, and not those of all three, is at the peak."""

    def build():
        return nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(3)))

    plan = plan_memory(on_meta(build), LORA, batch=torch.empty(2, 512), quantization=NF4)
    assert plan.step.backward["dequantized weights"] == 512 * 512 * 4


def test_parts_add_up_and_adapters_are_those_of_the_injection():
    module = llama()
    plan = plan_memory(module, LORA, batch=TokenBatch(2, 16))
    inject_adapters(module, LORA)
    adapters = sum(p.nbytes for name, p in module.named_parameters() if ".adapters." in name)
    assert plan.adapters == plan.gradients == adapters
    assert plan.base.total + plan.adapters == sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
    assert sum(plan.parts.values()) == plan.peak == sum(plan.moments[plan.moment].values())
    assert all(sum(parts.values()) <= plan.peak for parts in plan.moments.values())


def test_the_module_is_left_as_it_was_and_nothing_is_allocated():
    module = llama()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    classes = [type(child) for child in module.modules()]
    plan_memory(module, LORA, batch=(2, 16), precision="bf16-true", gradient_checkpointing=True, quantization=NF4)
    assert [type(child) for child in module.modules()] == classes
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert all(p.requires_grad and p.grad is None and p.dtype == torch.float32 for p in module.parameters())
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())


def test_a_run_that_no_machine_here_could_hold_is_planned():
    assert plan_memory(on_meta(llama), LORA, batch=(2**12, 2**10)).peak > 50 * 10**9


def test_recomputation_keeps_less_and_both_are_told():
    plan = plan_memory(on_meta(llama), LORA, batch=(4, 64))
    recomputing = plan_memory(on_meta(llama), LORA, batch=(4, 64), gradient_checkpointing=GradientCheckpointingConfig())
    assert plan.kept_without_recomputation == plan.step.kept == recomputing.kept_without_recomputation
    assert plan.kept_with_recomputation == recomputing.step.kept < plan.step.kept / 2


def test_gradients_that_accumulate_are_there_during_the_whole_step():
    once, often = (plan_memory(on_meta(llama), LORA, batch=(2, 16), accumulate_grad_batches=count) for count in (1, 4))
    assert often.step.backward["gradients"] == often.gradients
    assert once.step.backward.get("gradients", 0) < once.gradients


def test_without_a_config_everything_trains():
    module = on_meta(llama)
    plan = plan_memory(module, None, batch=(1, 8))
    size = sum(p.nbytes for p in module.parameters())
    assert (plan.adapters, plan.gradients) == (0, size)
    assert plan.optimizer_state == 2 * size + 4 * len(list(module.parameters()))


def test_a_lightning_module_runs_its_own_training_step_with_an_example_batch():
    class Regression(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 1))

        def training_step(self, batch, index):
            x, y, valid = batch
            loss = nn.functional.mse_loss(self.net(x)[valid], y[valid])
            self.log("loss", loss)
            return {"loss": loss}

    module = Regression()
    batch = (torch.randn(64, 32), torch.randn(64, 1), torch.arange(64) % 2 == 0)
    plan = plan_memory(module, LORA, batch=batch)
    inject_adapters(module, LORA)

    def loss():
        x, y, valid = batch
        return nn.functional.mse_loss(module.net(x)[valid], y[valid])

    assert step_of(plan) == pytest.approx(step_bytes(module, loss), rel=0.05)


class Recurrent(pl.LightningModule):
    def __init__(self, cell, **options):
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.recurrent = cell(32, 64, 2, batch_first=True, **options)
        self.head = nn.Linear(64, 50)

    def training_step(self, batch, index):
        hidden, _ = self.recurrent(self.embedding(batch["x"]))
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), batch["y"].flatten())


@pytest.mark.filterwarnings("ignore:TF32")  # said by torch's own mkldnn.flags
@pytest.mark.parametrize(("cell", "tolerance"), [(nn.GRU, 0.01), (nn.RNN, 0.01), (nn.LSTM, 0.12)])
def test_recurrent_networks_take_what_they_take_without_a_fused_kernel(cell, tolerance):
    config = LoRAConfig(rank=4, target_modules="head")
    module, batch = Recurrent(cell), {"x": tokens(4, 20) % 50, "y": tokens(4, 20) % 50}
    step = plan_memory(module, config, batch=batch).step
    planned = max(sum(parts.values()) - parts["batch"] for parts in (step.forward, step.backward))
    inject_adapters(module, config)
    with torch.backends.mkldnn.flags(enabled=False):
        assert planned == pytest.approx(step_bytes(module, lambda: module.training_step(batch, 0)), rel=tolerance)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")  # its names until transformers 5
@pytest.mark.parametrize("recompute", [None, False, True])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_module_runs_in_its_own_mode_with_its_own_switch_as_in_a_real_run(mode, recompute):
    """Dropout acts in training mode only, and so does the gradient checkpointing of transformers."""
    module = getattr(llama(attention_dropout=0.1), mode)()
    module.gradient_checkpointing_enable({"use_reentrant": False})
    plan = plan_memory(module, LORA, batch=(4, 64), gradient_checkpointing=recompute)
    inject_adapters(module, LORA)
    if recompute is not None:
        module.gradient_checkpointing_disable()
    if recompute:
        enable_gradient_checkpointing(module)
    ids = tokens(4, 64)
    measured = step_bytes(module, lambda: module(input_ids=ids, labels=ids).loss)
    assert step_of(plan) == pytest.approx(measured, rel=0.05)
    acts = recompute or (recompute is None and mode == "train")
    assert plan.settings["gradient checkpointing"] == ("on" if acts else "off")
    assert plan.step.kept == (plan.kept_with_recomputation if acts else plan.kept_without_recomputation)
    assert plan.kept_with_recomputation < plan.kept_without_recomputation / 2


def test_dropout_of_adapters_acts_where_the_base_is_in_eval_mode():
    """As in a run: the callback puts the adapters into training mode. A mask is there for a moment, and not kept."""
    net, batch = nn.Sequential(nn.Linear(64, 8)).eval(), torch.empty(512, 64)
    config = LoRAConfig(rank=4, target_modules="0")
    plans = [plan_memory(net, dataclasses.replace(config, dropout=p), batch=batch) for p in (0.0, 0.5)]
    assert sum(plans[0].step.forward.values()) < sum(plans[1].step.forward.values())
    assert plans[0].step.kept == plans[1].step.kept


def test_a_step_that_fails_is_refused_with_what_it_said_and_a_way_out():
    def step(module, batch):
        raise KeyError("no trainer here")

    with pytest.raises(UnsupportedSetupError, match=r"KeyError: 'no trainer here'.* Pass step="):
        plan_memory(llama(num_hidden_layers=1), LORA, batch=(1, 8), step=step)


def test_a_batch_encoding_is_planned_as_the_dict_that_it_holds():
    ids = tokens(4, 32)
    values = {"input_ids": ids, "labels": ids}
    module = llama(num_hidden_layers=1)
    plain, encoding = (plan_memory(module, LORA, batch=batch) for batch in (values, BatchEncoding(values)))
    assert encoding.to_dict() == plain.to_dict()
    assert encoding.replan("batch", 8).peak == plain.replan("batch", 8).peak


def test_a_larger_example_batch_takes_no_memory_for_its_values():
    example = {"image": torch.randn(2, 1), "label": torch.tensor([1, 2]), "pixels": torch.zeros(2, 9).byte()}
    larger = resized(example, 2**23)
    assert {key: leaf.is_meta for key, leaf in larger.items()} == {"image": True, "label": False, "pixels": True}
    assert larger["image"].shape == (2**23, 1) and set(larger["label"].tolist()) == {1, 2}
    assert example_of(larger, torch.bfloat16)["image"].dtype == torch.bfloat16


def test_a_step_of_ones_own_and_a_language_model_without_a_loss():
    net = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 50))
    plan = plan_memory(net, LoRAConfig(rank=2, target_modules="1"), batch=(4, 8))
    assert plan.step.kept >= 4 * 8 * 50 * 4
    own = plan_memory(
        net,
        LoRAConfig(rank=2, target_modules="1"),
        batch=(4, 8),
        step=lambda module, batch: module(batch["input_ids"]).sum(),
    )
    assert own.step.kept < plan.step.kept


def test_a_number_that_the_step_only_notes_does_not_stop_a_plan_which_says_so():
    net, config, batch = nn.Sequential(nn.Linear(4, 4)), LoRAConfig(rank=1, target_modules="0"), torch.ones(2, 4)
    noted = []

    def step(module, batch):
        loss = module(batch).sum()
        noted.append(loss.item())
        return loss

    plan = plan_memory(net, config, batch=batch, step=step)
    plain = plan_memory(net, config, batch=batch, step=lambda module, batch: module(batch).sum())
    assert noted and all(math.isnan(number) for number in noted)
    assert (plan.step.unknown_reads, plain.step.unknown_reads) == (1, 0)
    assert plan.parts == plain.parts
    assert ["NaN" in told(shown) for shown in (plan, plain)] == [True, False]


def told(plan):
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(plan)
    return console.export_text()


def test_a_step_that_looks_at_values_is_refused_with_a_way_out():
    def step(module, batch):
        output = module(batch)
        return output.sum() if output.sum() > 0 else output.mean()

    with pytest.raises(UnsupportedSetupError, match="Pass step="):
        plan_memory(
            nn.Sequential(nn.Linear(4, 4)), LoRAConfig(rank=1, target_modules="0"), batch=torch.ones(2, 4), step=step
        )


@pytest.mark.parametrize("quantization", [None, *FORMATS], ids=str)
def test_a_module_that_is_adapted_already_is_planned_as_it_is(quantization):
    module = llama()
    inject_adapters(module, LORA, quantization=quantization)
    assert_same_plan(
        plan_memory(module, None, batch=(2, 16), gradient_checkpointing=True),
        plan_memory(on_meta(llama), LORA, batch=(2, 16), quantization=quantization, gradient_checkpointing=True),
    )
    layers = [child for child in module.modules() if isinstance(child, QuantizedLayer)]
    assert bool(layers) == (quantization is not None)
    assert not any(layer.weight.is_meta for layer in layers)


def assert_same_plan(found, expected):
    found, expected = found.to_dict(), expected.to_dict()
    assert found["base"].pop("kept_dense") == {}  # what the injection left dense, and why, is in its report
    expected["base"].pop("kept_dense")
    assert found == expected


def test_layers_that_bitsandbytes_made_are_planned_once_they_are_adapted():
    module = nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="fp4"), nn.Linear(64, 8))
    with pytest.raises(UnsupportedSetupError, match="Pass the dense module"):
        plan_memory(module, None, batch=torch.empty(2, 64))
    inject_adapters(module, LORA)
    plan = plan_memory(module, None, batch=torch.empty(2, 64))
    assert plan.base.codes == module[0].weight.nbytes
    assert plan.settings["quantization"] == module[0].describe()


def test_metrics_that_look_at_values_do_not_stop_a_plan():
    class Scored(pl.LightningModule):
        def __init__(self, **metrics):
            super().__init__()
            self.net = nn.Linear(32, 5)
            self.metrics = nn.ModuleDict(metrics)

        def training_step(self, batch, index):
            x, y = batch
            logits = self.net(x)
            for name, metric in self.metrics.items():
                metric(logits, y)
                self.log_dict(metric) if name == "both" else self.log(name, metric)
            return nn.functional.cross_entropy(logits, y)

    accuracy = torchmetrics.classification.MulticlassAccuracy(5)
    collection = torchmetrics.MetricCollection([accuracy, torchmetrics.classification.MulticlassF1Score(5)])
    batch = torch.randn(8, 32), torch.arange(8) % 5
    plans = [
        plan_memory(Scored(**metrics), LoRAConfig(rank=2, target_modules="net"), batch=batch)
        for metrics in ({}, {"accuracy": accuracy, "both": collection})
    ]
    assert step_of(plans[0]) == step_of(plans[1])


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (torch.optim.AdamW, "adamw_fused"),  # one tensor after the other, on a CPU
        (functools.partial(torch.optim.AdamW, foreach=True), "adamw"),
        (functools.partial(torch.optim.SGD, momentum=0.9), "sgd_momentum"),
        (torch.optim.SGD, "sgd"),
        (bnb.optim.AdamW8bit, "adamw8bit"),
        (bnb.optim.PagedAdamW, "paged_adamw"),
    ],
)
def test_a_real_optimizer_says_what_it_keeps(build, name):
    module = llama(num_hidden_layers=1)
    real = plan_memory(module, LORA, batch=(1, 8), optimizer=build(module.parameters(), lr=1e-3))
    assert real.to_dict() == plan_memory(module, LORA, batch=(1, 8), optimizer=name).to_dict()


def test_an_optimizer_that_is_not_known_is_refused():
    optimizer = torch.optim.Adagrad(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match="what Adagrad keeps is not known"):
        plan_memory(llama(num_hidden_layers=1), LORA, batch=(1, 8), optimizer=optimizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "bf16"}, "bf16-true"),
        ({"optimizer": "adam"}, "adamw"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches must be at least 1"),
        ({"batch": (0, 8)}, "at least 1"),
        ({"config": None, "quantization": NF4}, "all layers train"),
    ],
)
def test_settings_without_meaning_are_refused(changes, message):
    settings = {"config": LORA, "batch": (1, 8), **changes}
    with pytest.raises(ValueError, match=message):
        plan_memory(on_meta(llama), settings.pop("config"), **settings)


@pytest.mark.parametrize("what", ["batch", "rank", "length"])
def test_the_largest_fits_and_one_more_does_not(what):
    plan = plan_memory(on_meta(lambda: llama(num_hidden_layers=1)), LORA, batch=(2, 16))
    limit = 4 * plan.peak_gb
    found = plan.largest(what, limit)
    assert plan.replan(what, found).fits(limit)
    assert not plan.replan(what, found + 1).fits(limit)


def test_the_batch_of_an_example_can_be_enlarged_and_its_length_cannot():
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    plan = plan_memory(net, LORA, batch={"input": torch.randn(4, 32)})
    assert plan.largest("batch", 100 * plan.peak_gb) > 400
    with pytest.raises(ValueError, match="TokenBatch"):
        plan.largest("length", 1.0)
    with pytest.raises(ValueError, match='"batch", "length", "rank"'):
        plan.largest("width", 1.0)


def test_nothing_fits_where_not_even_one_does():
    plan = plan_memory(on_meta(llama), LORA, batch=(2, 16))
    assert not plan.fits(1e-6)
    assert plan.largest("batch", 1e-6) == 0
    assert plan.fits(1.0, reserve=0.5) and not plan.fits(1.0, reserve=1.0)
    with pytest.raises(ValueError, match="positive number of GB"):
        plan.fits(0)


def test_gb_and_gib_are_told_apart_and_the_plan_is_json():
    plan = plan_memory(on_meta(llama), LORA, batch=(2, 16), quantization=NF4)
    assert plan.peak_gb == plan.peak / 10**9
    assert plan.peak_gib == plan.peak / 2**30
    values = json.loads(json.dumps(plan.to_dict()))
    assert values["peak"] == plan.peak
    text = told(plan)
    assert "base weights" in text and "GiB" in text and "lm_head" in text


def test_a_peak_before_the_first_adapted_layer_counts_the_casts_that_an_earlier_step_left():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))

        def forward(self, x):
            with torch.no_grad():
                scale = (x.unsqueeze(-1) * torch.ones(200_000)).mean()
            return self.layers(x * scale)

    def step(module, batch):
        return module(batch).float().square().mean()

    config = LoRAConfig(rank=2, target_modules="all-linear")
    plan = plan_memory(
        Wide(), config, batch=torch.randn(1, 256)[:, :4].repeat(1, 64), precision="bf16-mixed", step=step
    )
    assert plan.step.casts == 4 * 256 * 256 * 2
    assert plan.moment == "forward"
    assert plan.parts["weights cast for autocast"] == plan.step.casts
