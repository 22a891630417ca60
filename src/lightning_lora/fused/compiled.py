"""C++ of this package, compiled where it runs: once for each version of it, its flags and the compiler."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lightning_lora.errors import MissingDependencyError


def load_compiled(source: Path, flags: Sequence[str]) -> ctypes.CDLL:
    """Load the shared library of one C++ file, which is compiled first where it is not in the user's cache.

    The compiler is ``$CXX`` or g++; the cache is ``lightning_lora`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``.

    Raises:
        MissingDependencyError: If there is no compiler, or it can't compile the file.
    """
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        raise MissingDependencyError(
            f"{source.name} is compiled where it runs, and no C++ compiler was found. Install g++ "
            '(`apt install g++`), name another in $CXX, or leave LoRAConfig(kernels="torch").'
        )
    version = _run([compiler, "--version"], source)
    parts = [source.read_text(), *flags, compiler, version]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    library = _cache() / f"{source.stem}-{key}.so"
    if not library.exists():
        _compile(compiler, source, flags, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise MissingDependencyError(
            f"{source.name} was compiled to {library}, which can't be loaded: {error}. With another compiler than g++ "
            'its OpenMP may not be the one of torch; leave LoRAConfig(kernels="torch") if g++ is not at hand.'
        ) from error


def _compile(compiler: str, source: Path, flags: Sequence[str], library: Path) -> None:
    """Into a folder of its own first: another process may compile the same, and this one may be killed."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        compiled, linked = Path(folder, "compiled.o"), Path(folder, "linked.so")
        _run([compiler, *flags, "-fPIC", "-c", str(source), "-o", str(compiled)], source)
        # Linked without -fopenmp, so that it runs in the threads of the OpenMP that torch has loaded.
        _run([compiler, "-shared", str(compiled), "-o", str(linked)], source)
        linked.replace(library)


def _run(command: list[str], source: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MissingDependencyError(
            f"{source.name} is compiled where it runs, and `{' '.join(command)}` failed:\n{done.stderr[-2000:]}\n"
            'g++ 11 and later can compile it; leave LoRAConfig(kernels="torch") if none is at hand.'
        )
    return done.stdout


def _cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "lightning_lora")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="lightning_lora"))  # readable by this user alone
