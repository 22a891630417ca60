import lightning as L
import pytest
import torch

from lightning_lora.sft.data import CompanyMessages
from lightning_lora.sft.encoding import collate
from lightning_lora.sft.module import SFTModule

SCORES = {"test/loss", "test/valid_json", "test/field_f1", "test/exact_match"}


def make_module(pretrained, **options):
    return SFTModule(pretrained=pretrained, **{"max_new_tokens": 8, "autocast": "off", **options})


def make_data(pretrained, **options):
    sizes = {"train_size": 12, "validation_size": 6, "test_size": 6, "batch_size": 4, "eval_batch_size": 4}
    return CompanyMessages(pretrained=pretrained, **{**sizes, **options})


def make_trainer(folder, **options):
    return L.Trainer(
        default_root_dir=folder,
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.fixture
def module(tiny_pretrained):
    return make_module(tiny_pretrained)


@pytest.fixture(scope="module")
def batches(tiny_pretrained):
    data = make_data(tiny_pretrained)
    data.setup("test")
    return list(data.test_dataloader())


def loss_by_hand(module, batch):
    """Each row alone, without padding, with all logits."""
    total, count = 0.0, 0
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        ids, labels = ids[mask.bool()][None], labels[mask.bool()]
        log_probabilities = module.model(input_ids=ids).logits[0].log_softmax(dim=-1)
        answered = [position for position, label in enumerate(labels) if label >= 0]
        total -= sum(log_probabilities[p - 1, labels[p]].item() for p in answered)
        count += len(answered)
    return total / count


def test_the_loss_is_the_mean_over_answer_tokens_whatever_the_padding(module, batches):
    for batch in batches:
        assert module.answer_loss(batch).item() == pytest.approx(loss_by_hand(module, batch), rel=1e-5)


def test_padding_more_changes_no_loss_and_no_answer(module, batches):
    batch = batches[0]
    padded = dict(batch)
    for key, filler in (
        ("input_ids", 2),
        ("attention_mask", 0),
        ("position_ids", 0),
        ("labels", -100),
        ("prompt_ids", 2),
        ("prompt_mask", 0),
    ):
        padded[key] = torch.nn.functional.pad(batch[key], (5, 0), value=filler)
    module.eval()
    assert module.answer_loss(padded).item() == pytest.approx(module.answer_loss(batch).item(), rel=1e-5)
    assert module.answer(padded) == module.answer(batch)


def test_the_model_is_in_train_mode(module):
    assert all(child.training for child in module.modules())


def test_a_run_logs_the_scores_and_keeps_the_answers(tiny_pretrained, tmp_path):
    module, data, trainer = make_module(tiny_pretrained), make_data(tiny_pretrained), make_trainer(tmp_path)
    trainer.fit(module, data)
    assert "val/loss" in trainer.callback_metrics
    assert [step for step, _ in module.curve["train"]] == [0, 1, 2]
    assert [step for step, _ in module.curve["validation"]] == [3]
    for _ in range(2):
        (scores,) = trainer.test(module, data, verbose=False)
        assert set(scores) == SCORES
        assert all(0 <= scores[name] <= 1 for name in SCORES - {"test/loss"})
        assert len(module.samples) == 6
        assert all(set(sample) == {"prompt", "expected", "answer"} for sample in module.samples)


def test_training_lowers_the_loss(tiny_pretrained, tmp_path):
    module = make_module(tiny_pretrained, learning_rate=1e-2, warmup_steps=1)
    data = make_data(tiny_pretrained, train_size=64)
    trainer = make_trainer(tmp_path)
    before = trainer.validate(module, data, verbose=False)[0]["val/loss"]
    trainer.fit(module, data)
    after = trainer.validate(module, data, verbose=False)[0]["val/loss"]
    assert after < 0.9 * before


def test_the_learning_rate_warms_up_and_ends_at_zero(tiny_pretrained, tmp_path):
    rates = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = make_module(tiny_pretrained, learning_rate=1.0, warmup_steps=4)
    make_trainer(tmp_path, callbacks=[Watch()]).fit(module, make_data(tiny_pretrained, train_size=40))
    assert len(rates) == 10
    assert rates[0] == pytest.approx(0.25)
    assert rates[1] > rates[0]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[3:5] == [pytest.approx(1.0)] * 2
    assert rates[-1] == pytest.approx(1 / 6)


def test_training_may_compute_in_bfloat16_while_weights_and_evaluation_stay_float32(tiny_pretrained, batches):
    module = make_module(tiny_pretrained, autocast="bfloat16")
    dtypes = []
    module.model.lm_head.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    with module._training_arithmetic():
        module.answer_loss(batches[0])
    module.answer_loss(batches[0])
    assert dtypes == [torch.bfloat16, torch.float32]
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_evaluation_computes_in_the_weights_dtype_whatever_the_trainers_precision(tiny_pretrained, tmp_path):
    module, dtypes = make_module(tiny_pretrained), {True: set(), False: set()}
    module.model.lm_head.register_forward_hook(lambda _, __, output: dtypes[module.training].add(output.dtype))
    trainer = make_trainer(tmp_path, precision="bf16-mixed")
    trainer.fit(module, make_data(tiny_pretrained))
    trainer.test(module, make_data(tiny_pretrained), verbose=False)
    assert dtypes == {True: {torch.bfloat16}, False: {torch.float32}}


def test_hyper_parameters_open_with_weights_only(tiny_pretrained, tmp_path):
    module, trainer = make_module(tiny_pretrained), make_trainer(tmp_path)
    trainer.fit(module, make_data(tiny_pretrained))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    torch.load(tmp_path / "run.ckpt", weights_only=True)
    again = SFTModule.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), module.parameters(), strict=True))


@pytest.mark.parametrize(
    "option",
    [{"learning_rate": 0.0}, {"warmup_steps": -1}, {"autocast": "fp8"}, {"max_new_tokens": 0}, {"dtype": "int8"}],
)
def test_a_wrong_setting_is_named(tiny_pretrained, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))}="):
        make_module(tiny_pretrained, **option)


def test_batches_of_one_and_of_many_answer_alike(module, batches):
    module.eval()
    from lightning_lora.sft.encoding import encode

    batch = batches[0]
    rows = [encode(p, e, module.tokenizer) for p, e in zip(batch["prompts"], batch["expected"], strict=True)]
    alone = [module.answer(collate([row], pad_id=module.tokenizer.pad_token_id))[0] for row in rows]
    assert alone == module.answer(batch)
