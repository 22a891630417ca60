"""LightningModules from other people's packages, unchanged: fit, resume, test and merge under the callback."""

from __future__ import annotations

import math

import torch

from tests.wild.life import Life, adapter_tensors, in_eval


def test_every_adapter_is_trained(life: Life) -> None:
    run = life.whole
    assert run.lora.report is not None
    assert len(run.lora.report.layers) >= 2
    assert run.lora.report.trainable_parameters < run.lora.report.total_parameters
    assert run.losses and all(map(math.isfinite, run.losses))
    still = [key for key, value in run.adapters.items() if key.endswith("lora_B") and not value.any()]
    assert not still


def test_checkpoints_hold_only_what_was_trained(life: Life) -> None:
    run = life.whole
    files = sorted(run.checkpoints.glob("*.ckpt"))
    base = set(life.case.build().state_dict())
    asked = tuple(life.case.LORA.modules_to_save)
    assert len(files) == 3
    for file in files:
        checkpoint = torch.load(file, weights_only=life.weights_only)
        keys = set(checkpoint["state_dict"])
        assert keys >= set(run.adapters)
        assert all(any(f".{name}." in f".{key}" for name in asked) for key in keys & base)


def test_the_base_is_bit_identical_after_fit(life: Life) -> None:
    before, after = life.case.build().state_dict(), life.whole.module.state_dict()
    asked = tuple(life.case.LORA.modules_to_save)
    trained = {key for key in before if any(f".{name}." in f".{key}" for name in asked)}
    assert set(before) <= set(after)
    changed = [key for key in set(before) - trained if not torch.equal(before[key], after[key])]
    assert not changed


def test_a_run_resumed_in_a_new_module_is_bitwise_the_whole_run(life: Life) -> None:
    whole, resumed = life.whole, life.resumed
    assert resumed.trainer.global_step == whole.trainer.global_step
    assert resumed.adapters.keys() == whole.adapters.keys()
    assert all(torch.equal(resumed.adapters[key], value) for key, value in whole.adapters.items())
    assert resumed.losses == whole.losses[len(whole.losses) // 2 :]
    assert torch.equal(resumed.outputs, whole.outputs)


def test_a_checkpoint_gives_the_same_metrics_here_and_in_a_new_module(life: Life) -> None:
    run, new = life.whole, life.new_run("new")
    here = life.evaluate(run)
    assert life.evaluate(run, ckpt_path="best") == here
    life.evaluate(new, ckpt_path=str(run.first_epoch))
    assert any(not torch.equal(value, run.adapters[key]) for key, value in adapter_tensors(new.module).items())
    assert life.evaluate(new, ckpt_path=str(run.last)) == here
    assert all(torch.equal(value, run.adapters[key]) for key, value in adapter_tensors(new.module).items())


def test_the_merged_module_is_of_plain_classes_and_computes_the_same(life: Life) -> None:
    run, plain = life.resumed, life.case.build()
    assert run.lora.merge_report is not None
    assert run.lora.merge_report.max_relative_error < 1e-3
    assert run.module.state_dict().keys() == plain.state_dict().keys()
    assert [(name, type(child)) for name, child in run.module.named_modules()] == [
        (name, type(child)) for name, child in plain.named_modules()
    ]
    torch.testing.assert_close(in_eval(run.module, life.case.outputs), run.outputs, rtol=1e-4, atol=1e-4)
    adapted, merged = life.evaluate(life.whole), life.evaluate(run)
    assert merged.keys() == adapted.keys()
    assert all(math.isclose(merged[key], adapted[key], rel_tol=1e-3, abs_tol=1e-5) for key in adapted)


def test_a_checkpoint_tested_after_the_merge_gives_its_own_metrics(life: Life) -> None:
    assert life.evaluate(life.resumed, ckpt_path=str(life.whole.last)) == life.evaluate(life.whole)


def test_the_package_opens_the_merged_file_itself(life: Life) -> None:
    reopened = life.case.reopen(life.merged_file)
    assert type(reopened) is type(life.case.build())
    assert not adapter_tensors(reopened)
    torch.testing.assert_close(in_eval(reopened, life.case.outputs), life.resumed.outputs, rtol=1e-4, atol=1e-4)
