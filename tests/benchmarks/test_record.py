"""The JSON record of a run."""

import json

import pytest

from benchmarks import record


def test_a_record_names_machine_versions_date_load_and_command(tmp_path):
    path = record.write(tmp_path / "new" / "run.json", benchmark="step", environment=record.environment(), rows=[1])
    content = json.loads(path.read_text())
    assert content["benchmark"] == "step"
    assert content["rows"] == [1]
    assert content["date"].endswith("+00:00")
    assert {"processor", "logical_cores", "amx_bf16"} <= content["machine"].keys()
    assert content["versions"]["torch"]
    assert set(content["versions"]) == {"python", *record.PACKAGES}
    for field in ("command", "threads", "load_average_before", "load_average_after"):
        assert field in content


def test_the_record_does_not_name_the_host_or_the_user(tmp_path):
    import getpass
    import platform

    text = json.dumps(record.environment()["machine"])
    assert platform.node() not in text
    assert getpass.getuser() not in text.split('"')


def test_a_figure_that_is_not_a_number_is_refused_and_the_old_record_stays(tmp_path):
    path = record.write(tmp_path / "run.json", benchmark="step", environment={}, rows=[1])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        record.write(path, benchmark="step", environment={}, rows=[float("nan")])
    assert path.read_bytes() == before


def test_a_package_that_is_not_installed_has_no_version():
    assert record.version("no-such-distribution-exists") is None
