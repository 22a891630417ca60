"""An optimizer that steps flat tensors in the place of its own parameters, and shows the world those in its states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from lightning_lora.errors import UnsupportedSetupError
from lightning_lora.flat.state import join, require_divisible, split
from lightning_lora.flat.tensors import FlatTensors


class _Group(NamedTuple):
    """The parameters of a group in their order, and what the optimizer holds in their place."""

    own: list[nn.Parameter]
    flat: list[FlatTensors]


class FlatGroups:
    """Flat tensors in the groups of an optimizer until :meth:`release`.

    ``state_dict`` and ``load_state_dict`` of the optimizer go on to speak of its own parameters.

    Args:
        optimizer: Treats each value by itself.
        why_not: Called with a parameter that got no gradient where others did; after that the optimizer has its own
            parameters again.

    Raises:
        UnsupportedSetupError: If the states that it has can't be joined; then nothing is changed.
    """

    def __init__(self, optimizer: Optimizer, *, why_not: Callable[[nn.Parameter], None]) -> None:
        self._optimizer, self._why_not = optimizer, why_not
        self._groups: list[_Group] = []
        self._is_active = False
        try:
            self._flatten()
        except BaseException:
            self._unflatten()
            raise
        self._is_active = True
        self._handles = [
            optimizer.register_state_dict_post_hook(self._show),
            optimizer.register_load_state_dict_pre_hook(self._hide),
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        vars(optimizer)["zero_grad"] = self._zero_grad

    def gather(self) -> None:
        """Before gradients are clipped or a step is taken: take in what was made elsewhere."""
        if not self._is_active:
            return
        self._follow()
        tensors = [*self._tensors()]
        without = [parameter for flat in tensors for parameter in flat.gather()]
        if len(without) == sum(len(flat.parameters) for flat in tensors):
            for flat in tensors:  # no backward pass: an optimizer without gradients does nothing
                flat.skip()
        elif without:  # it is not to move at all, not even by a weight decay
            self._give_back(without)
            self._why_not(without[0])

    def release(self) -> None:
        """Give the optimizer its own parameters back, with their values, gradients and states."""
        for handle in self._handles:
            handle.remove()
        if self._is_active:
            self._give_back([])

    def _tensors(self) -> Iterator[FlatTensors]:
        for group in self._groups:
            yield from group.flat

    def _flatten(self) -> None:
        """Of groups that are not flat yet."""
        for group in self._optimizer.param_groups[len(self._groups) :]:
            own, flat = [*group["params"]], list[FlatTensors]()
            self._groups.append(_Group(own, flat))
            for alike in _alike(own):
                tensors = FlatTensors(alike)
                flat.append(tensors)
                self._join_states(tensors)
            group["params"][:] = [tensors.whole for tensors in flat]

    def _join_states(self, tensors: FlatTensors) -> None:
        state = self._optimizer.state
        states = [state.get(parameter, {}) for parameter in tensors.parameters]
        if any(states):
            state[tensors.whole] = join(states, tensors)
        for parameter in tensors.parameters:
            state.pop(parameter, None)

    def _give_back(self, without: list[nn.Parameter]) -> None:
        vars(self._optimizer).pop("zero_grad", None)
        self._is_active = False
        self._unflatten(without)

    def _unflatten(self, without: list[nn.Parameter] | None = None) -> None:
        state = self._optimizer.state
        for (own, flat), group in zip(self._groups, self._optimizer.param_groups, strict=False):
            for tensors in flat:
                found = state.pop(tensors.whole, None)
                if found:
                    state.update(zip(tensors.parameters, split(found, tensors), strict=True))
                tensors.release(without or [])
            group["params"][:] = own
        self._groups = []

    def _follow(self) -> None:
        """Make groups flat that were added since."""
        groups = self._optimizer.param_groups
        held = [[*map(id, group["params"])] for group in groups[: len(self._groups)]]
        if held != [[id(tensors.whole) for tensors in group.flat] for group in self._groups]:
            raise UnsupportedSetupError(
                "FlatOptimizer: other code changed the parameters in the optimizer's groups in the course of the "
                "training. Leave the callback out."
            )
        self._flatten()

    def _zero_grad(self, set_to_none: bool = True) -> None:
        self._follow()
        for tensors in self._tensors():
            tensors.await_gradients()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self.gather()
            return None

        def gathering() -> Any:
            result = closure()
            self.gather()  # again: hooks before the step and a clipping of the user's own may have put others
            return result

        return args[:1], {**kwargs, "closure": gathering}

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._is_active:
            return
        for tensors in self._tensors():
            tensors.note_step()
            require_divisible(optimizer.state.get(tensors.whole, {}), tensors)

    def _show(self, optimizer: Optimizer, found: dict[str, Any]) -> dict[str, Any] | None:
        """A state dict as if nothing were flat."""
        if not self._is_active:
            return None
        self._follow()
        states, groups, count = dict(found["state"]), [], 0
        shown: dict[Any, Any] = {}
        for (own, flat), packed in zip(self._groups, found["param_groups"], strict=True):
            numbers = {id(parameter): count + index for index, parameter in enumerate(own)}
            count += len(own)
            groups.append({**packed, "params": [*numbers.values()]})
            for tensors, index in zip(flat, packed["params"], strict=True):
                parts = split(states.pop(index, {}), tensors)
                shown |= {numbers[id(p)]: part for p, part in zip(tensors.parameters, parts, strict=True) if part}
        return {**found, "state": {**dict(sorted(shown.items())), **states}, "param_groups": groups}

    def _hide(self, optimizer: Optimizer, given: dict[str, Any]) -> dict[str, Any] | None:
        """Undo :meth:`_show`."""
        if not self._is_active:
            return None
        found, held = [len(group["params"]) for group in given["param_groups"]], [len(g.own) for g in self._groups]
        if found != held:  # as the optimizer itself would, which has fewer now
            raise ValueError(f"The state dict has groups of {found} parameters, and the optimizer of {held}.")
        states, groups, count = dict(given["state"]), [], 0
        hidden: dict[Any, Any] = {}
        for (own, flat), packed in zip(self._groups, given["param_groups"], strict=True):
            numbers = {id(parameter): index for parameter, index in zip(own, packed["params"], strict=True)}
            groups.append({**packed, "params": [*range(count, count + len(flat))]})
            for tensors in flat:
                parts = [states.pop(numbers[id(parameter)], {}) for parameter in tensors.parameters]
                hidden |= {count: join(parts, tensors)} if any(parts) else {}
                count += 1
        return {**given, "state": {**hidden, **states}, "param_groups": groups}


def _alike(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Those of one dtype and device together."""
    found: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    return [*found.values()]
