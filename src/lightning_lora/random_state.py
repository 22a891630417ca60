"""Let a resumed run draw the random numbers that it would have drawn without the stop: dropout, shuffling, noise.

Lightning restores weights, optimizers and progress, but no random stream. It also creates the iterator over the first
epoch's training data earlier in a resumed run than in one that goes on, and creating it draws from the stream.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora.errors import CheckpointError
from lightning_lora.patches import is_patched, original, patch, unpatch


def random_state(trainer: pl.Trainer) -> dict[str, Any]:
    """The random streams of this process, in plain types and tensors.

    Returns:
        The states of torch's generator on the CPU and on a CUDA device, of Python's and numpy's, and of the generators
        that the training data loaders have of their own.
    """
    device = trainer.strategy.root_device
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, torch.tensor(words, dtype=torch.uint32), gauss],
        "loaders": [generator.get_state() for generator in _loader_generators(trainer)],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = [name, torch.tensor(keys.tolist(), dtype=torch.uint32), *rest]
    return state


def resume_random_state(trainer: pl.Trainer, state: Mapping[str, Any]) -> None:
    """Put the streams back where ``state`` has them, once, when the fit goes on: not before its start-up has drawn.

    Raises:
        CheckpointError: If ``state`` is not what :func:`random_state` returned.
    """
    _check(state)
    patch(trainer.fit_loop.epoch_loop, "on_run_start", _start_epoch, trainer, dict(state))


def reach_epoch_start(trainer: pl.Trainer) -> None:
    """Put them back already for the hooks at the start of an epoch: without a stop, those follow the save, too."""
    loop = trainer.fit_loop.epoch_loop
    if is_patched(loop, "on_run_start", _start_epoch):
        _restore_once(trainer, loop.__dict__["on_run_start"].args[-1])


def forget_random_state(trainer: pl.Trainer) -> None:
    """Undo :func:`resume_random_state` where the run did not come to it."""
    unpatch(trainer.fit_loop.epoch_loop, "on_run_start", _start_epoch)


def _start_epoch(
    loop: Any, previous: Callable[..., Any] | None, trainer: pl.Trainer, state: dict[str, Any], fetcher: Any
) -> None:
    """What Lightning does when the batches of an epoch begin, with the streams at the point of the save."""
    forget_random_state(trainer)
    _restore_once(trainer, state)
    combined = fetcher.combined_loader
    before = combined._iterator
    original(loop, "on_run_start", previous)(fetcher)
    at_first_batch = loop.batch_progress.current.ready == 0
    if at_first_batch and combined._iterator is before and all(map(_starts_anew, combined.flattened)):
        iter(fetcher)


def _restore_once(trainer: pl.Trainer, state: dict[str, Any]) -> None:
    if not state:
        return
    # The file has the streams of rank 0. A rank that was seeded otherwise keeps its own, to stay different from it.
    if trainer.global_rank == 0 or _generator(state["torch"]).initial_seed() == torch.initial_seed():
        _restore(trainer, state)
    state.clear()


def _restore(trainer: pl.Trainer, state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(_python_state(state))
    if trainer.strategy.root_device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], trainer.strategy.root_device)
    if "numpy" in state and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(_numpy_state(state))
    generators = list(_loader_generators(trainer))
    if len(generators) == len(state["loaders"]):
        for generator, value in zip(generators, state["loaders"], strict=True):
            generator.set_state(value)


def _check(state: Mapping[str, Any]) -> None:
    """Try the state on generators of our own, so that a damaged file is refused before anything is changed."""
    try:
        for value in (state["torch"], *state["loaders"]):
            _generator(value)
        random.Random().setstate(_python_state(state))
        if "numpy" in state and "numpy" in sys.modules:
            sys.modules["numpy"].random.RandomState().set_state(_numpy_state(state))
    except Exception as error:  # torch, numpy and Python raise many types for a state that is none
        raise CheckpointError(f"The random state in this checkpoint is damaged: {error!r}.") from None


def _generator(state: Tensor) -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(state)
    return generator


def _python_state(state: Mapping[str, Any]) -> tuple[Any, ...]:
    version, words, gauss = state["python"]
    return version, tuple(words.tolist()), gauss


def _numpy_state(state: Mapping[str, Any]) -> tuple[Any, ...]:
    name, keys, *rest = state["numpy"]
    return name, keys.numpy(), *rest


def _loader_generators(trainer: pl.Trainer) -> Iterator[torch.Generator]:
    combined = trainer.fit_loop._combined_loader
    seen: set[int] = set()
    for loader in combined.flattened if combined is not None else ():
        for owner in (loader, getattr(loader, "sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator) and id(generator) not in seen:
                seen.add(id(generator))
                yield generator


def _starts_anew(loader: Any) -> bool:
    """Whether another ``iter(loader)`` loses nothing: a loader that restored a place of its own would lose that."""
    return isinstance(loader, DataLoader) and not hasattr(loader, "load_state_dict")
