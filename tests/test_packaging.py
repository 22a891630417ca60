"""What an installed lightning-lora gives, from the wheel and from an editable install, in fresh environments.

A fresh environment borrows this one's site-packages by path, so that only our package is installed anew: its
own come first, and the .pth file of this environment's lightning-lora isn't followed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOREIGN = ROOT / "examples" / "hydra_project"

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def fresh_environment(folder: Path) -> Path:
    """Make a virtual environment that finds everything but lightning-lora; return its interpreter."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    (Path(site) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python: Path, *what: str | Path) -> None:
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps")
    # pip would find the borrowed environment's lightning-lora installed, and leave it at that.
    run(*pip, "--no-build-isolation", "--ignore-installed", *what, cwd=ROOT)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", folder, ROOT, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    python = fresh_environment(tmp_path_factory.mktemp("wheel") / "venv")
    install(python, wheel)
    return python


@pytest.fixture(scope="module")
def installed_editable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    python = fresh_environment(tmp_path_factory.mktemp("editable") / "venv")
    install(python, "--editable", ROOT)
    return python


def test_the_wheel_holds_every_config_file_the_marker_the_kernels_and_the_licence(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"lightning_lora/conf/{path.relative_to(ROOT / 'conf').as_posix()}" for path in
               (ROOT / "conf").rglob("*") if path.suffix in (".yaml", ".py")}  # fmt: skip
    assert configs <= names
    assert {"lightning_lora/py.typed", "lightning_lora/fused/amx.cpp"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lightning_lora"}
    modules = {f"lightning_lora/{path.relative_to(ROOT / 'src' / 'lightning_lora').as_posix()}" for path in
               (ROOT / "src" / "lightning_lora").rglob("*.py")}  # fmt: skip
    assert {name for name in names if name.endswith(".py")} == modules
    assert len(names) == len(set(names))


def test_the_wheels_conf_is_plain_files_without_the_checkouts_pointer(wheel: Path) -> None:
    content = zipfile.ZipFile(wheel).read("lightning_lora/conf/__init__.py").decode()
    assert content == (ROOT / "conf" / "__init__.py").read_text()


@pytest.mark.parametrize("installed", ["installed_wheel", "installed_editable"])
def test_a_foreign_hydra_project_composes_our_groups(
    installed: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    python: Path = request.getfixturevalue(installed)
    find = "from importlib.util import find_spec; print(find_spec('lightning_lora').origin)"
    origin = run(python, "-c", find, cwd=tmp_path).strip()
    expected = ROOT / "src" if installed == "installed_editable" else python.parents[1]
    assert Path(origin).is_relative_to(expected)

    composed = run(python, FOREIGN / "main.py", "--cfg", "job", "--resolve", "adapter=lora_tied", cwd=tmp_path)
    assert "alpha: 4" in composed
    trained = run(python, FOREIGN / "main.py", "hydra.run.dir=out", cwd=tmp_path)
    assert "trained 88 parameters" in trained


def test_an_editable_install_serves_the_files_that_are_edited(installed_editable: Path, tmp_path: Path) -> None:
    code = (
        "from importlib.resources import files; from pathlib import Path; "
        "print(Path(str(files('lightning_lora.conf'))).resolve())"
    )
    assert Path(run(installed_editable, "-c", code, cwd=tmp_path).strip()) == ROOT / "conf"


def test_the_installed_command_runs(installed_wheel: Path, tmp_path: Path) -> None:
    script = installed_wheel.with_name("lightning-lora")
    assert "rank: 8" in run(script, "train", "experiment=tiny", "adapter.rank=8", "--cfg", "job", cwd=tmp_path)
