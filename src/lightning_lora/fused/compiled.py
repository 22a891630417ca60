"""C++ of this package, compiled where it runs: once for each version of it, its flags and the compiler."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lightning_lora.errors import MissingDependencyError


def load_compiled(source: Path, flags: Sequence[str]) -> ctypes.CDLL:
    """Load the shared library of one C++ file, which is compiled first where it is not in the user's cache.

    The compiler is ``$CXX`` or g++; the cache is ``lightning_lora`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``.
    Without one that is this user's alone to write, it is compiled for this process.

    Raises:
        MissingDependencyError: If there is no compiler, or it can't compile the file.
    """
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    if not compiler or shutil.which(compiler[0]) is None:
        raise MissingDependencyError(
            f"{source.name} is compiled where it runs, and no C++ compiler was found. Install g++ "
            '(`apt install g++`), name another in $CXX, or leave LoRAConfig(kernels="torch").'
        )
    version = _run([*compiler, "--version"], source)
    key = hashlib.sha256("\0".join([source.read_text(), *flags, *compiler, version]).encode()).hexdigest()[:16]
    cache = _cache()
    if cache is not None:
        library = cache / f"{source.stem}-{key}.so"
        if not library.exists():
            _compile(compiler, source, flags, library)
        return _load(library, source)
    with tempfile.TemporaryDirectory(prefix="lightning_lora") as folder:  # a loaded library needs no file
        library = Path(folder, source.stem + ".so")
        _compile(compiler, source, flags, library)
        return _load(library, source)


def _load(library: Path, source: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise MissingDependencyError(
            f"{source.name} was compiled to {library}, which can't be loaded: {error}. With another compiler than g++ "
            'its OpenMP may not be the one of torch; leave LoRAConfig(kernels="torch") if g++ is not at hand.'
        ) from error


def _compile(compiler: Sequence[str], source: Path, flags: Sequence[str], library: Path) -> None:
    """Into a folder of its own first: another process may compile the same, and this one may be killed."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        compiled, linked = Path(folder, "compiled.o"), Path(folder, "linked.so")
        _run([*compiler, *flags, "-fPIC", "-c", str(source), "-o", str(compiled)], source)
        # Linked without -fopenmp, so that it runs in the threads of the OpenMP that torch has loaded.
        _run([*compiler, "-shared", str(compiled), "-o", str(linked)], source)
        linked.replace(library)


def _run(command: Sequence[str], source: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MissingDependencyError(
            f"{source.name} is compiled where it runs, and `{shlex.join(command)}` failed:\n{done.stderr[-2000:]}\n"
            'g++ 11 and later can compile it; leave LoRAConfig(kernels="torch") if none is at hand.'
        )
    return done.stdout


def _cache() -> Path | None:
    """A folder that nobody but this user can write to: what lies in it is run."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "lightning_lora")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):  # no home, or one that can't be written to
        return None
    others_write = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if found.st_uid != os.getuid() or others_write or not os.access(folder, os.W_OK):
        return None
    return folder
