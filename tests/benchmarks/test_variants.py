"""The variants: one set of base weights, the same layers and values on both sides, and honest rows."""

import json

import pytest
import torch
from torch import nn

from benchmarks import checkpoint, models, peers, step, training

pytest.importorskip("peft", reason="the benchmarks compare with peft")
# PEFT asks transformers by the old name of a property.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(**changes):
    return models.Case(**{"shape": "tiny", "precision": "fp32", "rank": 4, "length": 16, **changes})


@pytest.mark.parametrize("field", ["shape", "precision", "targets"])
def test_an_unknown_case_is_refused_with_the_known_ones(field):
    with pytest.raises(ValueError, match=f"{field}='nonsense' is unknown, choose of"):
        tiny(**{field: "nonsense"})


def test_all_variants_use_the_very_same_base_tensors_and_leave_them_as_they_were():
    case = tiny()
    base = models.build_base(case)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    peft = models.with_peft(base, case)
    variants = [peft, models.with_ours(base, case, like=peft), models.frozen_floor(base, case)]
    addresses = {parameter.data_ptr() for parameter in base.parameters()}
    for model in variants:
        training.build_step(model, case, optimizer=True)()
        frozen = {parameter.data_ptr() for parameter in model.parameters() if not parameter.requires_grad}
        assert frozen == addresses
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
    assert all(parameter.grad is None for parameter in base.parameters())


def test_the_frozen_floor_trains_nothing_and_its_gradient_reaches_the_embeddings():
    model = models.frozen_floor(models.build_base(tiny()), tiny())
    reached = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: output.register_hook(reached.append) and None
    )
    training.build_step(model, tiny(), optimizer=True)()
    assert training.trainable(model) == []
    assert reached[0].abs().sum() > 0


@pytest.mark.parametrize("targets", list(models.TARGETS))
def test_ours_and_peft_adapt_the_same_layers_and_compute_the_same(targets):
    variants = step.build_variants(tiny(targets=targets))
    steps = {name: training.build_step(model, tiny(), optimizer=False) for name, model in variants.items()}
    found = training.agreement(steps["ours"], steps["peft"], precision="fp32")
    assert max(found.values()) < 1e-6
    assert models.our_adapters(variants["ours"]).keys() == models.peft_adapters(variants["peft"]).keys()


@pytest.mark.parametrize(
    "changes", [{"layers": "last-half"}, {"gradient_checkpointing": True}, {"shape": "tiny-vit"}], ids=str
)
def test_ours_and_peft_compute_the_same_in_every_setting(changes):
    case = tiny(**changes)
    steps = {name: training.build_step(m, case, optimizer=False) for name, m in step.build_variants(case).items()}
    assert max(training.agreement(steps["ours"], steps["peft"], precision="fp32").values()) < 1e-6
    adapted = {layer for layer, _ in models.our_adapters(steps["ours"].model)}
    assert any(".layers.0." in layer for layer in adapted) == (case.layers == "all")


def test_the_twin_of_the_self_test_is_another_model_with_the_same_values():
    variants = step.build_variants(tiny())
    pairs = zip(
        models.peft_adapters(variants["peft"]).values(),
        models.peft_adapters(variants["peft-twin"]).values(),
        strict=True,
    )
    for ours, twin in pairs:
        assert torch.equal(ours, twin)
        assert ours.data_ptr() != twin.data_ptr()


def test_variants_that_compute_different_things_are_not_compared():
    variants = step.build_variants(tiny())
    with torch.no_grad():
        next(iter(models.our_adapters(variants["ours"]).values())).mul_(-1)
    ours, peft = (training.build_step(variants[name], tiny(), optimizer=False) for name in ("ours", "peft"))
    with pytest.raises(RuntimeError, match="compute different things"):
        training.agreement(ours, peft, precision="fp32")


def test_adapters_are_not_copied_between_models_that_adapt_different_layers():
    case = tiny()
    base = models.build_base(case)
    with pytest.raises(ValueError, match="on one side"):
        models.with_ours(base, case, like=models.with_peft(base, tiny(targets="q+v")))


def test_peft_has_a_cheaper_setting_over_a_bf16_base_only():
    bf16 = step.build_variants(tiny(precision="bf16"))
    assert {p.dtype for p in training.trainable(bf16["peft"])} == {torch.float32}
    assert {p.dtype for p in training.trainable(bf16["peft-best"])} == {torch.bfloat16}
    assert {p.dtype for p in training.trainable(bf16["ours"])} == {torch.float32}
    assert "peft-best" not in step.build_variants(tiny())


def test_a_run_of_the_step_benchmark_prints_and_records_every_row(tmp_path, capsys):
    output = tmp_path / "step.json"
    arguments = ["--shape", "tiny", "--rank", "4", "--length", "16", "--rounds", "3", "--precision", "bf16", "fp32"]
    arguments += ["--targets", "q+v", "--dropout", "0", "--output", str(output)]
    code = step.main(arguments)
    rows = json.loads(output.read_text())["rows"]
    assert [row["case"]["precision"] for row in rows] == ["bf16", "fp32"]
    assert code == (0 if all(row["self_test"]["passed"] for row in rows) else 1)
    assert "self-test" in capsys.readouterr().out
    for row in rows:
        assert all(len(seconds) == 3 for seconds in row["seconds"].values())
        memory = row["memory"]
        ours = memory["ours"]["saved_bytes"]
        assert 0 < ours < min(memory["ours"]["peak_bytes"], memory["peft"]["saved_bytes"])
        assert memory["ours"]["trainable_bytes"] == 4 * sum(
            (shape_in + shape_out) * 4 for shape_in, shape_out in [(32, 32), (32, 16)] * 2
        )


def test_a_run_of_the_checkpoint_benchmark_finds_adapters_only_and_counts_every_byte(tmp_path):
    output = tmp_path / "checkpoint.json"
    checkpoint.main(["--shape", "tiny", "--rank", "4", "--rounds", "2", "--targets", "q+v", "--output", str(output)])
    (row,) = json.loads(output.read_text())["rows"]
    values = sum((shape_in + shape_out) * 4 for shape_in, shape_out in [(32, 32), (32, 16)] * 2)
    assert row["least_bytes"] == {"adapters": 4 * values, "adapters_and_optimizer": 12 * values + 4 * 8}
    assert row["contents"]["ours"]["frozen_tensors"] == row["contents"]["ours-weights-only"]["frozen_tensors"] == 0
    assert row["bytes"]["lightning+peft"] > row["base_bytes"] > row["bytes"]["ours"] > 12 * values
    assert row["bytes"]["torch.save"] == pytest.approx(row["bytes"]["ours"], rel=0.1)


def test_bytes_of_a_checkpoint_count_every_tensor_in_it():
    nested = {"state_dict": {"a": torch.zeros(2)}, "states": [{"b": (torch.ones(3), 1)}], "epoch": 1}
    assert [name for name, _ in checkpoint.tensors(nested)] == ["/state_dict/a", "/states/0/b/0"]


def test_shared_copies_keep_tied_weights_tied():
    base = models.build_base(tiny())
    copy = models.share(base)
    assert copy.lm_head.weight is copy.model.embed_tokens.weight is base.lm_head.weight
    assert copy.lm_head is not base.lm_head
    assert isinstance(copy, nn.Module)


@pytest.mark.filterwarnings("ignore")  # their imports warn of much
@pytest.mark.parametrize("name", list(peers.PEERS))
@pytest.mark.parametrize(
    "changes",
    [{}, {"targets": "q+v"}, {"layers": "last-half"}, {"gradient_checkpointing": True}, {"shape": "tiny-vit"}],
    ids=str,
)
def test_a_peers_layers_hold_the_same_adapters_over_the_same_weights(name, changes):
    if name not in peers.installed():
        pytest.skip(f"{name} is not installed: requirements-peers.txt")
    case = tiny(**changes)
    variants = step.build_variants(case, others=[name])
    steps = {key: training.build_step(model, case, optimizer=False) for key, model in variants.items()}
    assert max(training.agreement(steps[name], steps["peft"], precision="fp32").values()) < 1e-6
    frozen = {p.data_ptr() for p in variants[name].parameters() if not p.requires_grad}
    assert frozen <= {p.data_ptr() for p in variants["frozen"].parameters()}
    assert len(training.trainable(variants[name])) == len(training.trainable(variants["peft"]))
