"""Under autocast a frozen weight is cast once, and whatever changes it is seen."""

from __future__ import annotations

import copy
import pickle

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRACallback, LoRAConfig, inject_adapters, merge_adapters, remove_adapters

CONFIG = LoRAConfig(rank=2, target_modules=["0"])


def adapted(width=32):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(width, width), nn.Tanh())
    inject_adapters(net, CONFIG)
    return net


def rows(width=32):
    return torch.randn(4, width, generator=torch.Generator().manual_seed(1)).requires_grad_()


def forward(net, x=None):
    with torch.autocast("cpu", torch.bfloat16):
        return net(rows() if x is None else x)


def kept(net):
    return None if net[0].cast_copy is None else net[0].cast_copy.kept


def test_a_training_pass_keeps_the_cast_and_the_next_one_uses_it():
    net = adapted()
    first = forward(net)
    copied = kept(net)
    assert copied.dtype == torch.bfloat16
    assert torch.equal(copied, net[0].weight.to(torch.bfloat16))
    assert torch.equal(forward(net), first)
    assert kept(net) is copied


def test_every_pass_computes_what_a_fresh_cast_gives_bitwise():
    net, other = adapted(), adapted()
    for _ in range(3):
        x, y = rows(), rows()
        forward(net, x).float().sum().backward()
        if other[0].cast_copy is not None:
            other[0].cast_copy.drop()
        forward(other, y).float().sum().backward()
        assert torch.equal(x.grad, y.grad)
        for ours, theirs in zip(net.parameters(), other.parameters()):
            assert (ours.grad is None) == (theirs.grad is None)
            assert ours.grad is None or torch.equal(ours.grad, theirs.grad)


def write_in_place(net):
    with torch.no_grad():
        net[0].weight.mul_(2.0)


def load_a_state_dict(net):
    state = {key: value * 2.0 if key == "0.weight" else value for key, value in net.state_dict().items()}
    net.load_state_dict(state)


def set_data(net):
    net[0].weight.data = net[0].weight.data * 2.0


def set_data_at_the_same_address(net):
    """The allocator hands out what was freed last, so an address alone says nothing."""
    doubled, address = (net[0].weight.data * 2.0).numpy().copy(), net[0].weight.data_ptr()
    net[0].weight.data = torch.empty(0)
    tried = []
    while not tried or (tried[-1].data_ptr() != address and len(tried) < 100):
        tried.append(torch.empty(doubled.shape))
    net[0].weight.data = tried[-1].copy_(torch.from_numpy(doubled))


def replace_the_parameter(net):
    net[0].weight = nn.Parameter(net[0].weight.detach() * 2.0, requires_grad=False)


def transpose_the_data(net):
    net[0].weight.data = net[0].weight.data.t()


CHANGES = [
    write_in_place,
    load_a_state_dict,
    set_data,
    set_data_at_the_same_address,
    replace_the_parameter,
    transpose_the_data,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_cast_anew(change):
    net = adapted()
    before = forward(net)
    change(net)
    after = forward(net)
    assert not torch.equal(after, before)
    assert torch.equal(kept(net), net[0].weight.to(torch.bfloat16))


def test_another_autocast_dtype_is_cast_anew():
    net = adapted()
    forward(net)
    with torch.autocast("cpu", torch.float16):
        assert net(rows()).dtype == torch.float16


def no_grad(net):
    with torch.no_grad():
        forward(net)


def inference_mode(net):
    with torch.inference_mode():
        forward(net)


def recomputed(net):
    checkpoint(forward, net, rows(), use_reentrant=False).float().sum().backward()


def recomputed_reentrant(net):
    x = rows()
    checkpoint(lambda x: forward(net, x), x, use_reentrant=True).float().sum().backward()


def offloaded(net):
    with torch.autograd.graph.save_on_cpu():
        forward(net)


def without_autocast(net):
    net(rows())


@pytest.mark.parametrize(
    "run", [no_grad, inference_mode, recomputed, recomputed_reentrant, offloaded, without_autocast]
)
def test_where_memory_is_saved_nothing_is_kept(run):
    net = adapted()
    run(net)
    assert kept(net) is None


def test_an_evaluation_between_two_steps_uses_the_copy_and_leaves_it():
    net = adapted()
    trained = forward(net)
    copied = kept(net)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(forward(net), trained)
        assert kept(net) is copied
    forward(net).float().sum().backward()


def test_no_copy_of_the_module_and_no_file_holds_it():
    net = adapted()
    forward(net)
    size = len(pickle.dumps(net))
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert kept(twin) is None
        assert torch.equal(forward(twin), forward(net))
    net[0].cast_copy.drop()
    assert len(pickle.dumps(net)) == size
    assert not any("cast" in key for key in net.state_dict())


@pytest.mark.parametrize("leave", [remove_adapters, merge_adapters])
def test_a_layer_that_is_plain_again_keeps_nothing(leave):
    net = adapted()
    forward(net)
    leave(net)
    assert "cast_copy" not in vars(net[0])


@pytest.mark.parametrize("where", [torch.bfloat16, "meta"])
def test_a_module_that_is_moved_or_cast_leaves_no_copy_behind(where):
    net = adapted()
    forward(net)
    net.to(where)
    assert kept(net) is None


def test_a_base_that_is_in_the_dtype_already_is_not_copied():
    net = adapted().to(torch.bfloat16)
    forward(net)
    assert kept(net) is None


class Fitted(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
        self.copies = []

    def training_step(self, batch, batch_idx):
        loss = self.net(batch).float().square().mean()
        self.copies.append(kept(self.net))
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Written(Fitted):
    """Writes where autograd does not look, in the hooks in which users do such things."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.seen.append(torch.equal(self.copies[-1], self.net[0].weight.to(torch.bfloat16)))
        return loss

    def validation_step(self, batch, batch_idx):
        self.net(batch)
        assert kept(self.net) is None

    def on_train_epoch_start(self):
        self.net[0].weight.data.mul_(1.5)

    def on_validation_epoch_end(self):
        self.net[0].weight.data.mul_(1.5)


def test_a_write_through_data_in_a_hook_of_an_epoch_or_a_validation_is_seen(tmp_path):
    module = Written()
    rows = torch.utils.data.DataLoader(torch.randn(16, 32), batch_size=4)
    trainer = L.Trainer(
        default_root_dir=tmp_path, max_epochs=2, precision="bf16-mixed", callbacks=[LoRACallback(print_report=False)],
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, val_check_interval=2,
    )  # fmt: skip
    trainer.fit(module, rows, rows)
    assert module.seen == [True] * 8


def test_a_fit_keeps_one_copy_from_step_to_step_and_gives_it_back(tmp_path):
    module = Fitted()
    trainer = L.Trainer(
        default_root_dir=tmp_path, max_epochs=2, precision="bf16-mixed", callbacks=[LoRACallback(print_report=False)],
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(8, 32), batch_size=4))
    first, second = module.copies[:2], module.copies[2:]  # of each epoch
    assert first[0] is not None and first[0] is first[1]
    assert second[0] is not None and second[0] is second[1]
    assert kept(module.net) is None
