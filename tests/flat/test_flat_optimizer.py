"""FlatOptimizer: the run that it would have been, with one tensor for the optimizer."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora import FlatOptimizer, LoRACallback, UnsupportedSetupError
from tests.conftest import TinyModule
from tests.hazards.runs import checkpointing, fit, is_adapter_only, lora, trained
from tests.states import adapters_of, read, same

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")


class Lion(Optimizer):
    """A user's own optimizer (arXiv:2302.06675), which writes through ``.data``."""

    def __init__(self, params: Any, lr: float = 1e-3, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                p.data.add_(torch.sign(average * group["beta"] + p.grad * (1 - group["beta"])), alpha=-group["lr"])
                average.lerp_(p.grad, 1 - group["beta"])
        return loss


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, eps=1e-3),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "Lion": lambda p: Lion(p),
}


class Net(TinyModule):
    """With an optimizer of choice, and a record of how many tensors it stepped."""

    def __init__(self, optimizer: str = "AdamW", **options: Any) -> None:
        super().__init__(**options)
        self.make = OPTIMIZERS[optimizer]
        self.stepped: list[int] = []

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.stepped.append(sum(len(group["params"]) for group in self.trainer.optimizers[0].param_groups))


@pytest.fixture
def run(make_trainer: Any) -> Callable[..., pl.Trainer]:
    def start(module: pl.LightningModule, *, flat: bool, resume: Any = None, **options: Any) -> pl.Trainer:
        callbacks = [lora(), *options.pop("callbacks", []), *([FlatOptimizer(elementwise=True)] if flat else [])]
        trainer = make_trainer(callbacks=callbacks, **{"max_epochs": 2, "gradient_clip_val": 0.5, **options})
        fit(trainer, module, ckpt_path=resume)
        return trainer

    return start


def close(a: nn.Module, b: nn.Module) -> bool:
    first, second = adapters_of(a), adapters_of(b)
    return trained(a) and all(torch.allclose(first[key], second[key], rtol=1e-4, atol=1e-6) for key in first)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_run_is_the_one_without_it(run: Any, kind: str) -> None:
    plain, flat = Net(kind), Net(kind)
    run(plain, flat=False)
    run(flat, flat=True)
    assert close(flat, plain)
    assert set(plain.stepped) == {4}
    assert set(flat.stepped) == {1}


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": None},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
    ],
    ids=str,
)
def test_so_it_is_with_options_of_the_trainer(run: Any, options: dict[str, Any]) -> None:
    plain, flat = Net(), Net()
    run(plain, flat=False, **options)
    run(flat, flat=True, **options)
    assert close(flat, plain)
    assert set(flat.stepped) == {1}


def test_groups_keep_their_settings(run: Any) -> None:
    class Groups(Net):
        def configure_optimizers(self) -> Any:
            last = [p for name, p in self.named_parameters() if "backbone.3" in name]
            first = [p for name, p in self.named_parameters() if "backbone.3" not in name]
            return torch.optim.AdamW([{"params": first, "lr": 1e-2}, {"params": last, "lr": 1e-4, "betas": (0.5, 0.9)}])

    plain, flat = Groups(), Groups()
    run(plain, flat=False)
    run(flat, flat=True)
    assert close(flat, plain)
    assert set(flat.stepped) == {2}


def test_afterwards_parameters_and_optimizer_are_what_they_were(run: Any) -> None:
    module = Net()
    trainer = run(module, flat=True)
    (optimizer,) = trainer.optimizers
    adapters = [p for p in module.parameters() if p.requires_grad]
    assert [*map(id, optimizer.param_groups[0]["params"])] == [*map(id, adapters)]
    assert {*map(id, optimizer.state)} == {*map(id, adapters)}
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in adapters)
    assert "zero_grad" not in vars(optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_state_dict_post_hooks
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks


def test_the_same_after_an_error(make_trainer: Any) -> None:
    class Failing(Net):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("full disk")

    module = Failing()
    trainer = make_trainer(callbacks=[lora(), FlatOptimizer()])
    with pytest.raises(RuntimeError, match="full disk"):
        fit(trainer, module)
    assert len(trainer.optimizers[0].param_groups[0]["params"]) == 4
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "SGD, momentum", "NAdam", "Lion"])
def test_a_checkpoint_is_that_of_a_run_without_it(run: Any, tmp_path: Path, kind: str) -> None:
    states, sizes = [], []
    for flat in (False, True):
        run(Net(kind), flat=flat, **checkpointing(tmp_path / str(flat)))
        path = tmp_path / str(flat) / "last.ckpt"
        assert is_adapter_only(path)
        states.append(read(path)["optimizer_states"][0])
        sizes.append(path.stat().st_size)
    plain, flat_state = states
    assert flat_state["state"].keys() == plain["state"].keys()
    assert [g["params"] for g in flat_state["param_groups"]] == [g["params"] for g in plain["param_groups"]]
    for index, state in plain["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(flat_state["state"][index][key], value, rtol=1e-4, atol=1e-6)
    assert sizes[1] < sizes[0] * 1.1


@pytest.mark.parametrize("kind", ["AdamW", "SGD, momentum", "Lion"])
def test_a_resume_continues_bitwise(run: Any, tmp_path: Path, kind: str) -> None:
    whole, resumed = Net(kind), Net(kind)
    run(whole, flat=True, max_epochs=3, **checkpointing(tmp_path, save_top_k=-1, filename="{epoch}"))
    run(resumed, flat=True, max_epochs=3, resume=tmp_path / "epoch=0.ckpt")
    assert same(adapters_of(whole), adapters_of(resumed))
    assert trained(resumed)


@pytest.mark.parametrize("saved", [True, False])
def test_a_run_with_it_resumes_one_without_and_the_other_way(run: Any, tmp_path: Path, saved: bool) -> None:
    whole, resumed = Net(), Net()
    run(whole, flat=saved, max_epochs=3, **checkpointing(tmp_path, save_top_k=-1, filename="{epoch}"))
    run(resumed, flat=not saved, max_epochs=3, resume=tmp_path / "epoch=0.ckpt")
    assert close(resumed, whole)


def test_a_second_fit_begins_anew(run: Any) -> None:
    plain, flat = Net(), Net()
    for _ in range(2):
        run(plain, flat=False)
        run(flat, flat=True)
    assert close(flat, plain)


def test_the_adapters_are_merged_at_fit_end(make_trainer: Any) -> None:
    module = Net()
    callback = lora(merge=True)
    fit(make_trainer(callbacks=[FlatOptimizer(), callback]), module)
    assert callback.merge_report is not None
    assert adapters_of(module) == {}


class Skipping(Net):
    """In one batch the second layer is not part of the loss."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step != self.at:
            return super().training_step(batch, batch_idx)
        return self.backbone[0](batch[0]).square().mean()


def test_what_gets_no_gradient_in_a_step_does_not_move_in_it(run: Any) -> None:
    plain, flat = Skipping(at=2), Skipping(at=2)
    run(plain, flat=False, max_epochs=3)
    with pytest.warns(UserWarning, match="'backbone.3.adapters.default.lora_A' got no gradient"):
        run(flat, flat=True, max_epochs=3)
    assert close(flat, plain)
    assert flat.stepped == [1, 1, 4, 4, 4, 4]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_without_a_loss_moves_nothing(run: Any) -> None:
    class Empty(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if self.trainer.global_step in (0, 2) else super().training_step(batch, batch_idx)

    plain, flat = Empty(), Empty()
    for module in (plain, flat):
        run(module, flat=module is flat, max_epochs=3)
    assert close(flat, plain)
    assert set(flat.stepped) == {1}


class Scaled(Net):
    """Puts other gradients in, or zeroes them past the optimizer, with a step without a loss in between."""

    how = ""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        is_empty = self.how == "zeroing" and self.trainer.global_step == 1
        return None if is_empty else super().training_step(batch, batch_idx)

    def _scale(self) -> None:
        for p in self.parameters():
            if p.grad is not None:
                p.grad = p.grad * 1e-3

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.how == "hook":
            self._scale()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        if self.how == "zeroing":
            self.zero_grad()
        else:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if self.how == "closure first":
            optimizer_closure()
            self._scale()
            optimizer.optimizer.step()
            optimizer.zero_grad()
        else:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("how", ["hook", "zeroing", "closure first"])
def test_gradients_that_a_hook_puts_in_are_those_that_count(run: Any, how: str) -> None:
    plain, flat = Scaled("SGD"), Scaled("SGD")
    for module in (plain, flat):
        module.how = how
        run(module, flat=module is flat, gradient_clip_val=None)
    assert close(flat, plain)
    assert set(flat.stepped) == {1}


def test_weights_that_are_swapped_for_an_evaluation_come_back(run: Any) -> None:
    class Swapping(pl.Callback):
        def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            self.kept = {p: p.data for p in module.parameters() if p.requires_grad}
            for p in self.kept:
                p.data = torch.zeros_like(p)

        def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            for p, data in self.kept.items():
                p.data = data.clone()

    plain, flat = Net(), Net()
    for module in (plain, flat):
        run(module, flat=module is flat, callbacks=[Swapping()])
    assert close(flat, plain)
    assert set(flat.stepped) == {1}


@pytest.mark.filterwarnings("ignore:FlatOptimizer. 'backbone.3.adapters.default.lora_A' got no gradient")
def test_an_adapter_that_the_loss_does_not_reach_is_still_noticed(run: Any) -> None:
    class Bypassing(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.backbone[0](x))

    module = Bypassing()
    with pytest.warns(UserWarning, match="2 of 4 adapter tensors got no gradient"):
        run(module, flat=True)


def test_an_optimizer_that_is_loaded_in_between_goes_on_flat(run: Any) -> None:
    class Reloading(Net):
        def on_train_epoch_start(self) -> None:
            (optimizer,) = self.trainer.optimizers
            optimizer.load_state_dict(optimizer.state_dict())

    plain, flat = Reloading(), Reloading()
    for module in (plain, flat):
        run(module, flat=module is flat)
    assert close(flat, plain)
    assert set(flat.stepped) == {1}


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def other(make: Callable[[Any], Any]) -> Callable[[], Net]:
    def build() -> Net:
        module = Net()
        module.make = make
        return module

    return build


class OwnClipping(Net):
    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        super().configure_gradient_clipping(*args, **kwargs)


class OwnZeroing(torch.optim.AdamW):
    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)


KNOWN = FlatOptimizer(elementwise=True)
REFUSED: dict[str, tuple[Callable[[], Net], list[pl.Callback], str]] = {
    "an unknown class": (other(lambda p: Lion(p)), [FlatOptimizer()], "whether Lion treats each value by itself"),
    "a subclass": (other(lambda p: OwnZeroing(p)), [FlatOptimizer()], "whether OwnZeroing treats each value"),
    "a line search": (other(lambda p: torch.optim.LBFGS(p)), [FlatOptimizer()], "whether LBFGS treats each value"),
    "rows": (other(lambda p: torch.optim.Adafactor(p)), [FlatOptimizer()], "whether Adafactor treats each value"),
    "a zero_grad": (other(lambda p: OwnZeroing(p)), [KNOWN], "OwnZeroing has a zero_grad of its own"),
    "a clipping": (OwnClipping, [FlatOptimizer()], "its own configure_gradient_clipping"),
    "manual optimization": (Manual, [FlatOptimizer()], "automatic_optimization=False"),
    "two callbacks": (Net, [FlatOptimizer(), FlatOptimizer()], "there are two of it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_another_run_is_refused(make_trainer: Any, name: str) -> None:
    build, callbacks, message = REFUSED[name]
    module = build()
    with pytest.raises(UnsupportedSetupError, match=f"FlatOptimizer: .*{message}"):
        fit(make_trainer(callbacks=[lora(), *callbacks]), module)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in module.parameters())


def test_a_number_without_dimensions_is_refused(make_trainer: Any) -> None:
    callback = LoRACallback(lora().config, print_report=False)
    callback.config = type(callback.config)(rank=2, modules_to_save=("head",))
    module = Net()
    module.head.register_parameter("number", nn.Parameter(torch.zeros(())))
    with pytest.raises(UnsupportedSetupError, match="single number"):
        fit(make_trainer(callbacks=[callback, FlatOptimizer()]), module)


def test_states_of_different_steps_are_refused_and_nothing_is_changed(run: Any, tmp_path: Path) -> None:
    run(Skipping(at=1), flat=False, **checkpointing(tmp_path, save_top_k=-1, filename="{epoch}"))
    module = Skipping(at=1)
    with pytest.raises(UnsupportedSetupError, match="their 'step' differs"):
        run(module, flat=True, max_epochs=3, resume=tmp_path / "epoch=0.ckpt")
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in module.parameters() if p.requires_grad)


def test_blocks_of_8_bits_are_refused(make_trainer: Any) -> None:
    pytest.importorskip("bitsandbytes")
    callback = LoRACallback(lora().config, optimizer="adamw8bit", print_report=False)
    with pytest.raises(UnsupportedSetupError, match="AdamW8bit keeps its state in blocks"):
        fit(make_trainer(callbacks=[callback, FlatOptimizer()]), Net())


class Growing(Net):
    """A parameter joins the optimizer in the second epoch, in a group of its own."""

    def configure_optimizers(self) -> Any:
        late = [p for name, p in self.named_parameters() if "backbone.3" in name and p.requires_grad]
        early = [p for name, p in self.named_parameters() if "backbone.3" not in name]
        for p in late:
            p.requires_grad_(False)
        self.late = late
        return torch.optim.AdamW(early, lr=1e-2)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            for p in self.late:
                p.requires_grad_(True)
            self.trainer.optimizers[0].add_param_group({"params": self.late, "lr": 1e-2})


def test_a_group_that_is_added_in_the_run_is_stepped_too(run: Any, tmp_path: Path) -> None:
    plain, flat = Growing(), Growing()
    for module in (plain, flat):
        run(module, flat=module is flat, max_epochs=3, **checkpointing(tmp_path / str(module is flat)))
    assert close(flat, plain)
    assert flat.stepped == [1, 1, 2, 2, 2, 2]
    states = [read(tmp_path / name / "last.ckpt")["optimizer_states"][0] for name in ("False", "True")]
    assert states[0]["state"].keys() == states[1]["state"].keys()


def test_a_group_that_is_changed_in_the_run_is_refused(run: Any) -> None:
    class Changing(Net):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.trainer.optimizers[0].param_groups[0]["params"].append(nn.Parameter(torch.zeros(2)))

    with pytest.raises(UnsupportedSetupError, match="other code changed the parameters in the optimizer's groups"):
        run(Changing(), flat=True)


def test_a_state_that_cannot_be_loaded_leaves_the_run_as_it_is(run: Any) -> None:
    class Failing(Net):
        def on_train_epoch_start(self) -> None:
            (optimizer,) = self.trainer.optimizers
            found = optimizer.state_dict()
            found["param_groups"][0]["params"] = [0]
            with pytest.raises(ValueError, match="group"):
                optimizer.load_state_dict(found)

    plain, flat = Failing(), Failing()
    for module in (plain, flat):
        run(module, flat=module is flat)
    assert close(flat, plain)
    assert set(flat.stepped) == {1}


class Counting(Lion):
    """Keeps a number beside the states of its parameters."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        self.state["all"]["steps"] = self.state["all"].get("steps", 0) + 1
        return super().step(closure)


def test_what_an_optimizer_keeps_for_all_parameters_is_saved(run: Any, tmp_path: Path) -> None:
    module = other(lambda p: Counting(p))()
    run(module, flat=True, **checkpointing(tmp_path))
    saved = read(tmp_path / "last.ckpt")["optimizer_states"][0]["state"]
    assert saved["all"] == {"steps": 4}
    assert [*saved] == [0, 1, 2, 3, "all"]


class Flattening(Lion):
    """Keeps a tensor in a form of its own."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p]["start"] = torch.zeros(2, p.numel())
        return loss


def test_a_state_that_could_not_be_saved_is_refused_in_the_first_step(run: Any) -> None:
    with pytest.raises(UnsupportedSetupError, match="keeps 'start' in a form that is neither"):
        run(other(lambda p: Flattening(p))(), flat=True)


def test_autograd_sees_that_a_step_changed_the_values(run: Any) -> None:
    class Versions(Net):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_end(outputs, batch, batch_idx)
            seen.append([p._version for p in self.parameters() if p.requires_grad])

    seen: list[list[int]] = []
    run(Versions(), flat=True)
    assert all(b > a for one, two in itertools.pairwise(seen) for a, b in zip(one, two, strict=True))


def test_gradients_with_a_graph_keep_none_of_it(run: Any) -> None:
    class Twice(Net):
        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            loss.backward(create_graph=True)

        def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
            assert all(p.grad.grad_fn is None for p in self.parameters() if p.grad is not None)

    with pytest.warns(UserWarning, match="create_graph=True"):
        run(Twice(), flat=True)


def test_it_gives_up_in_a_step_that_begins_with_the_closure(run: Any) -> None:
    class First(Skipping):
        def on_train_start(self) -> None:
            self.trainer.optimizers[0].register_step_pre_hook(lambda *_: None)

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer_closure()
            optimizer.step()

    plain, flat = First(at=1), First(at=1)
    run(plain, flat=False, gradient_clip_val=None)
    with pytest.warns(UserWarning, match="got no gradient in a step"):
        run(flat, flat=True, gradient_clip_val=None)
    assert close(flat, plain)


def test_a_tensor_outside_of_the_module_is_stepped_and_named_where_it_gets_no_gradient(run: Any) -> None:
    class Outside(Net):
        def configure_optimizers(self) -> Any:
            self.outside = [nn.Parameter(torch.ones(3))]
            return torch.optim.AdamW([*self.parameters(), *self.outside], lr=1e-2)

    module = Outside()
    with pytest.warns(UserWarning, match="a tensor outside of the module got no gradient"):
        run(module, flat=True)
    assert torch.equal(module.outside[0], torch.ones(3))
    assert trained(module)


def test_a_copy_of_the_module_in_the_run_is_its_own(run: Any) -> None:
    class Copying(Net):
        def on_train_epoch_end(self) -> None:
            copies.append((copy.deepcopy(self.backbone), [p.clone() for p in self.backbone.parameters()]))

    copies: list[Any] = []
    run(Copying(), flat=True)
    for copied, values in copies:
        assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), values, strict=True))
