"""A swapped optimizer trains as the user's did, under the same schedules, wrappers, hooks and references.

Moments of fewer than 4096 values stay fp32 in bitsandbytes' AdamW8bit, and its update is then torch's but for rounding:
so a swapped run with small adapters has to equal the run that was not swapped.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW8bit, PagedAdamW, PagedAdamW8bit
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import StepLR

from tests.conftest import make_loader
from tests.hazards.test_manual_optimization import Adversarial
from tests.integration.lives import LIGHTNINGS_ADVICE, quiet_trainer
from tests.optimizer_swap.runs import LARGE, SCHEDULES, SMALL, STEPS, Net, fit, swap, swapping
from tests.states import adapters_of, base_of, same

PAGED_ON_CPU = "ignore:optimizer=.paged_:UserWarning"
pytestmark = [*LIGHTNINGS_ADVICE, pytest.mark.filterwarnings(PAGED_ON_CPU)]
CLASSES = {"adamw8bit": AdamW8bit, "paged_adamw8bit": PagedAdamW8bit, "paged_adamw": PagedAdamW}


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[key], b[key], rtol=1e-4, atol=1e-6) for key in a)


def step(optimizer: Optimizer, *, times: int = 1) -> None:
    for _ in range(times):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.sin(torch.arange(1.0, parameter.numel() + 1)).view_as(parameter) + parameter
        optimizer.step()


def parameter(numel: int = 8192, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, numel, dtype=dtype))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_keeps_groups_and_schedules(tmp_path: Path, schedule: str) -> None:
    plain, swapped = Net(SMALL, schedule), Net(SMALL, schedule)
    fit(tmp_path / "plain", plain, None)
    trainer = fit(tmp_path / "swapped", swapped, "adamw8bit")
    assert isinstance(trainer.optimizers[0], AdamW8bit)
    assert swapped.settings == plain.settings
    assert close(adapters_of(swapped), adapters_of(plain))
    assert same(base_of(swapped), base_of(Net(SMALL)))


@pytest.mark.parametrize("kind", CLASSES)
def test_every_kind_has_the_class_that_it_names(tmp_path: Path, kind: str) -> None:
    plain, swapped = Net(), Net()
    fit(tmp_path / "plain", plain, None)
    trainer = fit(tmp_path / "swapped", swapped, kind)
    assert isinstance(trainer.optimizers[0], CLASSES[kind])
    assert close(adapters_of(swapped), adapters_of(plain))


@pytest.mark.parametrize(
    "options", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 1e-3}, {"precision": "bf16-mixed"}], ids=str
)
def test_a_run_keeps_the_options_of_its_trainer(tmp_path: Path, options: dict[str, Any]) -> None:
    plain, swapped = Net(), Net()
    fit(tmp_path / "plain", plain, None, **options)
    fit(tmp_path / "swapped", swapped, "adamw8bit", **options)
    assert close(adapters_of(swapped), adapters_of(plain))


@pytest.mark.parametrize("fused", [None, True])
def test_a_gradient_scaler_and_clipping_go_with_a_swapped_optimizer(tmp_path: Path, fused: bool | None) -> None:
    def half() -> Any:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=2)  # so large that steps are skipped
        return {"plugins": MixedPrecision("16-mixed", "cpu", scaler)}

    plain, swapped = Net(), Net(fused=fused)
    fit(tmp_path / "plain", plain, None, gradient_clip_val=1.0, **half())
    trainer = fit(tmp_path / "swapped", swapped, "adamw8bit", gradient_clip_val=1.0, **half())
    steps = {state["step"] for state in trainer.optimizers[0].state.values()}
    assert 0 < max(steps) < trainer.global_step
    assert close(adapters_of(swapped), adapters_of(plain))


def test_two_optimizers_stepped_by_hand_are_both_swapped(tmp_path: Path) -> None:
    plain, swapped = Adversarial(), Adversarial()
    fit(tmp_path / "plain", plain, None)
    trainer = fit(tmp_path / "swapped", swapped, "adamw8bit")
    assert [isinstance(optimizer, AdamW8bit) for optimizer in trainer.optimizers] == [True, True]
    assert close(adapters_of(swapped), adapters_of(plain))


def test_an_optimizer_that_holds_nothing_any_more_is_left_alone(tmp_path: Path) -> None:
    class Half(Adversarial):
        def configure_optimizers(self) -> list[Optimizer]:
            return [torch.optim.Adam(self.generator.parameters()), torch.optim.SGD(self.critic.parameters(), lr=1)]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self._step(self.optimizers()[0], self.generator(batch[0]).square().mean())

        def _step(self, optimizer: Any, loss: Tensor) -> None:
            self.manual_backward(loss)
            optimizer.step()

    trainer = quiet_trainer(tmp_path, swapping(target_modules=[r"generator\.\d"]))
    with pytest.warns(UserWarning, match=r"optimizer 1 \(SGD\) holds only frozen parameters"):
        trainer.fit(Half(), make_loader())
    assert [type(optimizer).__name__ for optimizer in trainer.optimizers] == ["AdamW8bit", "SGD"]


def test_the_optimizer_and_the_wrapper_of_lightning_stay_the_same_objects() -> None:
    optimizer = torch.optim.AdamW([parameter()], lr=0.1)
    group = optimizer.param_groups[0]
    trainer = quiet_trainer(Path())
    trainer.strategy.optimizers = [optimizer]
    (wrapper,) = trainer.strategy._lightning_optimizers
    swap(optimizer)
    trainer = swap(wrapper)  # configure_optimizers may return one
    assert trainer.strategy._lightning_optimizers == [wrapper]
    assert wrapper.optimizer is optimizer
    assert isinstance(wrapper, LightningOptimizer)
    assert isinstance(wrapper, AdamW8bit)
    assert optimizer.param_groups[0] is group
    assert repr(optimizer).startswith("AdamW8bit")


def test_a_wrapper_that_the_module_holds_steps_the_swapped_class(tmp_path: Path) -> None:
    class Keeping(Net):
        def on_train_start(self) -> None:
            self.kept = self.optimizers()

    module = Keeping()
    fit(tmp_path, module, "adamw8bit")
    assert isinstance(module.kept, AdamW8bit)
    assert isinstance(module.made, AdamW8bit)
    assert all("state1" in state for state in module.made.state.values())


def test_the_groups_are_those_that_bitsandbytes_would_make() -> None:
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-5, "weight_decay": 0.2}
    first, second = [parameter()], [parameter()]
    swapped, theirs = torch.optim.AdamW(first, fused=True, **settings), AdamW8bit(second, **settings)
    swap(swapped)
    assert same(swapped.state_dict()["param_groups"], theirs.state_dict()["param_groups"])
    assert swapped.defaults == {**theirs.defaults}
    step(swapped, times=3)
    step(theirs, times=3)
    assert same(swapped.state_dict(), theirs.state_dict())
    assert torch.equal(first[0], second[0])


def test_a_learning_rate_in_a_tensor_stays_one() -> None:
    plain, other = torch.optim.AdamW([parameter(64)], lr=torch.tensor(0.1)), parameter(64)
    swapped = torch.optim.AdamW([other], lr=torch.tensor(0.1))
    pair = [(plain, StepLR(plain, 1, 0.5)), (swapped, StepLR(swapped, 1, 0.5))]
    swap(swapped)
    for optimizer, scheduler in pair * 3:
        step(optimizer)
        scheduler.step()
    assert swapped.param_groups[0]["lr"] == plain.param_groups[0]["lr"] == torch.tensor(0.1 / 8)
    assert torch.allclose(other, plain.param_groups[0]["params"][0], rtol=1e-4)


def test_a_schedule_ahead_of_the_optimizer_is_still_warned_of() -> None:
    optimizer = torch.optim.AdamW([parameter()])
    scheduler = StepLR(optimizer, 1)
    swap(optimizer)
    with pytest.warns(UserWarning, match=r"Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        scheduler.step()


def test_a_schedule_behind_the_optimizer_is_not_warned_of() -> None:
    optimizer = torch.optim.AdamW([parameter()])
    one, two = StepLR(optimizer, 1), StepLR(optimizer, 2)
    swap(optimizer)
    step(optimizer)
    one.step()
    two.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_a_scheduler_made_after_the_swap_wraps_the_step_only_once() -> None:
    optimizer = torch.optim.AdamW([parameter()])
    StepLR(optimizer, 1)
    swap(optimizer)
    wrapped = optimizer.step
    StepLR(optimizer, 1)
    assert optimizer.step is wrapped


def test_hooks_around_the_step_are_called() -> None:
    optimizer, calls = torch.optim.AdamW([parameter()]), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    swap(optimizer)
    step(optimizer)
    optimizer.state_dict()
    assert calls == ["before", "after", "saved"]


def test_a_closure_is_evaluated_with_gradients() -> None:
    weight = parameter()
    optimizer = torch.optim.AdamW([weight])
    StepLR(optimizer, 1)
    swap(optimizer)

    def closure() -> float:
        loss = weight.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == pytest.approx(weight.numel() / 3, rel=1e-2)
    assert optimizer.state[weight]["state1"].any()


@pytest.mark.parametrize("kind", [*CLASSES, "adamw"])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
@pytest.mark.parametrize("numel", [64, 8192])
def test_a_copy_steps_as_the_original(kind: str, clone: Any, numel: int) -> None:
    optimizer = torch.optim.AdamW([parameter(numel)], lr=0.1)
    StepLR(optimizer, 1)
    swap(optimizer, kind=kind)
    unused = clone(optimizer)
    step(optimizer, times=2)
    twin = clone(optimizer)
    for one in (optimizer, twin):
        step(one)
    assert same(twin.state_dict(), optimizer.state_dict())
    assert torch.equal(twin.param_groups[0]["params"][0], optimizer.param_groups[0]["params"][0])
    step(unused, times=3)
    assert same(unused.state_dict()["state"], optimizer.state_dict()["state"])


@pytest.mark.parametrize(("numel", "dtype"), [(4095, torch.float32), (4096, torch.uint8)])
def test_moments_have_8_bits_from_4096_elements_up(numel: int, dtype: torch.dtype) -> None:
    weight = parameter(numel)
    optimizer = torch.optim.AdamW([weight])
    swap(optimizer)
    step(optimizer)
    assert {optimizer.state[weight][key].dtype for key in ("state1", "state2")} == {dtype}


def test_a_module_that_keeps_its_optimizer_goes_on_with_it_in_a_second_fit(tmp_path: Path) -> None:
    class Keeping(Net):
        made: Any = None

        def configure_optimizers(self) -> Any:
            return super().configure_optimizers() if self.made is None else self.made

    module = Keeping(LARGE)
    first = fit(tmp_path, module, "adamw8bit", epochs=1).optimizers[0]
    second = fit(tmp_path, module, "adamw8bit", epochs=1).optimizers[0]
    assert second is first
    assert {state["step"] for state in second.state.values()} == {2 * STEPS}


def test_an_optimizer_of_bitsandbytes_itself_is_left_as_it_is() -> None:
    optimizer = AdamW8bit([parameter()])
    swap(optimizer)
    assert type(optimizer) is AdamW8bit


@pytest.mark.parametrize("decoupled", [False, True])
def test_adam_becomes_torchs_adamw(decoupled: bool) -> None:
    options = {"decoupled_weight_decay": True, "weight_decay": 0.3} if decoupled else {}
    adam, adamw = parameter(), parameter()
    optimizer = torch.optim.Adam([adam], lr=0.1, **options)
    reference = torch.optim.AdamW([adamw], lr=0.1, weight_decay=options.get("weight_decay", 0))
    step(optimizer)
    step(reference)
    swap(optimizer, kind="adamw")
    assert type(optimizer) is torch.optim.AdamW
    step(optimizer)
    step(reference)
    assert torch.equal(adam, adamw)
    assert same(optimizer.state_dict(), reference.state_dict())
    assert optimizer.defaults == {**reference.defaults, "lr": 0.1, "weight_decay": optimizer.defaults["weight_decay"]}


def test_a_subclass_with_a_constructor_of_its_own_is_swapped_like_its_parent() -> None:
    class Mine(torch.optim.AdamW):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.5)
            self.args = "mine"

    weight = parameter()
    optimizer = Mine([weight])
    swap(optimizer)
    step(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.state[weight]["state1"].dtype is torch.uint8


def test_paged_memory_that_a_cpu_lacks_is_said_once(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, Adversarial(), "paged_adamw8bit")
    said = [str(warning.message) for warning in caught if "aged" in str(warning.message)]
    assert said == ['optimizer="paged_adamw8bit": on a CPU there is no paged memory; the state is in ordinary one.']


def test_the_learning_rate_finder_leaves_nothing_behind_that_speaks_against_a_swap(tmp_path: Path) -> None:
    class Tuned(Net):
        lr = 1e-3

        def configure_optimizers(self) -> Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=self.lr)

    module = Tuned()
    finder = LearningRateFinder(num_training_steps=15, early_stop_threshold=None)
    trainer = quiet_trainer(tmp_path, swapping(), finder, epochs=1)
    trainer.fit(module, make_loader(rows=8 * 16))
    assert isinstance(trainer.optimizers[0], AdamW8bit)
    assert trainer.optimizers[0].param_groups[0]["lr"] == module.lr != 1e-3
    assert all("state1" in state for state in trainer.optimizers[0].state.values())


def test_8_bit_moments_train_as_well_as_fp32_ones(tmp_path: Path) -> None:
    losses = {}
    for kind in (None, "adamw8bit"):
        trainer = fit(tmp_path / str(kind), Net(LARGE, lr=1e-3), kind, epochs=10)
        losses[kind] = torch.tensor(trainer.logger.of("train_loss_epoch"))  # type: ignore[union-attr]
    assert losses[None][-1] < losses[None][0] / 2
    assert torch.allclose(losses["adamw8bit"], losses[None], rtol=0.05)
    assert not torch.equal(losses["adamw8bit"], losses[None])
