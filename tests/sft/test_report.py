"""One real run of the tiny model under the callback, and what its report says."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import LoRACallback, LoRAConfig, MergeConfig, QuantizationConfig, inject_adapters
from lightning_lora.errors import MergeError
from lightning_lora.sft.data import CompanyMessages
from lightning_lora.sft.module import SFTModule
from lightning_lora.sft.proof import compare_answers, find_model_folder
from lightning_lora.sft.report import BeforeAfterReport, _base_bytes

pytestmark = pytest.mark.slow  # new processes import transformers

SCORES = {"valid_json", "field_f1", "exact_match", "loss"}


@pytest.fixture(scope="module")
def run(tiny_pretrained, tmp_path_factory):
    pytest.importorskip("matplotlib", reason="the loss curve needs matplotlib")
    folder = tmp_path_factory.mktemp("run")
    model = SFTModule(pretrained=tiny_pretrained, autocast="off", max_new_tokens=12, learning_rate=2e-2, warmup_steps=1)
    data = CompanyMessages(pretrained=tiny_pretrained, train_size=48, validation_size=4, test_size=8, eval_batch_size=3)
    lora = LoRACallback(
        LoRAConfig(rank=4),
        merge_on_fit_end=MergeConfig(output_dir=str(folder / "merged")),
        print_report=False,
    )
    trainer = L.Trainer(
        default_root_dir=folder,
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        callbacks=[lora, ModelCheckpoint(folder / "checkpoints", save_last=True)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    report = BeforeAfterReport(str(folder), base_name="tiny")
    (before,) = trainer.test(model, data, verbose=False)
    report.record_before(model, before)
    trainer.fit(model, data)
    (after,) = trainer.test(model, data, ckpt_path="last", verbose=False)
    report.record_after(model, after)
    written = report.write(trainer=trainer, lora=lora, seconds=1.25)
    return folder, written, model


def test_report_json_holds_what_is_returned(run):
    folder, written, _ = run
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(written))


def test_the_keys_that_programs_read_are_there(run):
    _, written, _ = run
    assert {"before", "after", "checkpoint_bytes", "base_bytes", "merge", "seconds"} <= set(written)
    for test in ("before", "after"):
        assert set(written[test]) == SCORES
    assert written["after"]["loss"] < written["before"]["loss"]
    assert 1.2 < written["seconds"] < 600  # the time of the proof is in it
    assert written["test_samples"] == 8


def test_bytes_are_those_of_the_file_and_of_the_base(run, tiny_pretrained):
    folder, written, _ = run
    assert written["checkpoint_bytes"] == (folder / "checkpoints" / "last.ckpt").stat().st_size
    base, _ = SFTModule(pretrained=tiny_pretrained).model, None
    assert written["base_bytes"] == sum(p.numel() * p.element_size() for p in base.parameters())


def test_the_merged_folder_gives_the_adapted_answers_without_this_package(run):
    _, written, _ = run
    assert written["merge"]["same_answers"] == written["merge"]["compared_answers"] == 8
    assert written["merge"]["different_answers"] == []
    assert Path(written["merge"]["model_folder"]).is_dir()


def test_the_three_samples_show_both_answers(run):
    _, written, _ = run
    assert len(written["samples"]) == 3
    assert all(set(sample) == {"prompt", "expected", "before", "after"} for sample in written["samples"])
    assert any(sample["before"] != sample["after"] for sample in written["samples"])


def test_the_loss_curve_is_a_png(run):
    folder, _, _ = run
    assert (folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_proof_notices_other_weights(run, tmp_path):
    from transformers import AutoModelForCausalLM

    folder, _, model = run
    merged = find_model_folder(folder / "merged")
    spoiled = AutoModelForCausalLM.from_pretrained(merged)
    with torch.no_grad():
        spoiled.get_input_embeddings().weight.copy_(spoiled.get_input_embeddings().weight.flip(0))
    spoiled.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    found = compare_answers(tmp_path, model.samples, max_new_tokens=12)
    assert found["same_answers"] < found["compared_answers"]
    assert len(found["different_answers"]) == found["compared_answers"] - found["same_answers"]


def test_a_folder_that_cannot_be_opened_is_an_error_with_its_reason(tmp_path):
    with pytest.raises(MergeError, match="could not answer"):
        compare_answers(tmp_path, [{"prompt": "x", "answer": "y"}], max_new_tokens=1)


def test_a_report_without_its_tests_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="record_before"):
        BeforeAfterReport(str(tmp_path)).write(trainer=L.Trainer(logger=False), lora=LoRACallback(), seconds=0.0)


def test_the_base_in_4_bits_counts_codes_and_constants_and_no_adapter(tiny_pretrained):
    pytest.importorskip("bitsandbytes", reason="a 4-bit base needs bitsandbytes")
    module = SFTModule(pretrained=tiny_pretrained)
    dense = _base_bytes(module)
    linear = sum(layer.weight.numel() for layer in module.model.model.layers.modules() if hasattr(layer, "in_features"))
    inject_adapters(module, LoRAConfig(rank=2), quantization=QuantizationConfig(quant_type="nf4", block_size=64))
    assert _base_bytes(module) == dense - 4 * linear + linear // 2 + 4 * linear // 64
