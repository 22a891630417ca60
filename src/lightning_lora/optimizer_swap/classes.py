"""bitsandbytes' optimizers, with what they lack to be copied, pickled and resumed.

The only module of this package that imports bitsandbytes; it is imported when an optimizer is swapped or unpickled.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.optim import adamw
from bitsandbytes.optim.optimizer import Optimizer2State
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.errors import AdapterMismatchError

_MAPS = {"qmap1": "dynamic", "qmap2": "udynamic"}  # key in the state of a parameter: name among those of the optimizer


def complete(optimizer: Optimizer) -> None:
    """Give ``optimizer`` what the constructor of its class sets beyond that of torch; the rest stays as it is."""
    parameter = nn.Parameter(torch.empty(0))
    torchs, fresh = torch.optim.AdamW([parameter]), type(optimizer)([parameter])  # type: ignore[call-arg]
    vars(optimizer).update({key: value for key, value in vars(fresh).items() if key not in vars(torchs)})
    for values in (optimizer.defaults, *optimizer.param_groups):
        for key in torchs.defaults.keys() - fresh.defaults.keys():
            values.pop(key, None)  # fused=True would make Lightning and a GradScaler leave the unscaling to step()
        for key in fresh.defaults.keys() - torchs.defaults.keys():
            values.setdefault(key, fresh.defaults[key])


class _Resumable(Optimizer2State):
    """Copies and pickles as torch's optimizers do, and refuses, shares and pages what it gets from a file."""

    # Parameters whose state came from a file or a copy and lies in ordinary memory.
    _restored: set[Tensor]
    _cpu_paged_warned = True  # bitsandbytes would say it of every optimizer and every copy; the swap says it once

    def __setstate__(self, state: dict[str, Any]) -> None:
        # bitsandbytes' own load_state_dict ends here, too.
        self._require_own(state["state"].values())
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "args" not in vars(self):  # torch's __getstate__ gives a copy and a pickle only state and groups
            complete(self)
        self._share_maps()
        self._restored = set(self.state) if self.is_paged else set()

    def prefetch_state(self, p: Tensor) -> None:
        # Saving, loading and copying keep the mark of a paged tensor and lose the memory: to prefetch it is an
        # "invalid argument" (bitsandbytes#782, axolotl#864), or, where a move lost the mark, too, nothing is paged.
        # Not in __setstate__, after which Lightning moves the state to the device again.
        if p in vars(self).get("_restored", ()):
            state = self.state[p]
            for key in ("state1", "state2"):
                buffer = self.get_state_buffer(p, dtype=state[key].dtype)  # type: ignore[no-untyped-call]
                state[key] = buffer.copy_(state[key])
            self._restored.remove(p)
        super().prefetch_state(p)  # type: ignore[no-untyped-call]

    def _require_own(self, states: Any) -> None:
        for state in states:
            if state and "state1" not in state:
                raise AdapterMismatchError(
                    f"The optimizer state in the checkpoint holds {', '.join(map(repr, state))} for a parameter, as "
                    f"torch's Adam and AdamW do, and the optimizer here is {type(self).__name__} of bitsandbytes. "
                    "Resume with the same optimizer= and configure_optimizers, or load only the weights "
                    "(load_from_checkpoint)."
                )

    def _share_maps(self) -> None:
        """The two tables of 256 values are the same for all parameters: a file with a copy for each is up to 25 % more.

        Moved to a device in a load, each becomes a tensor of its own.
        """
        for state in self.state.values():
            for key in _MAPS.keys() & state.keys():
                shared = self.name2qmap[_MAPS[key]].to(state[key].device)
                if torch.equal(shared, state[key]):
                    state[key] = self.name2qmap[_MAPS[key]] = shared


class AdamW8bit(_Resumable, adamw.AdamW8bit):
    """AdamW with 8-bit moments."""


class PagedAdamW8bit(_Resumable, adamw.PagedAdamW8bit):
    """AdamW with 8-bit moments in paged memory."""


class PagedAdamW(_Resumable, adamw.PagedAdamW):
    """AdamW with fp32 moments in paged memory."""
