"""Change what a module does without changing what it is: put a mixin in front of its own class, in place.

The object stays the same, so its name, keys, hooks, and every reference to it stay valid, and ``isinstance`` with its
old class stays true. Knows nothing of adapters.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn


class SwappedClass(nn.Module):
    """Root of every mixin given to :func:`swap_class`; makes the classes built at run time copy and pickle.

    Attributes:
        class_prefix: What the class name in a printed module gets in front.
    """

    class_prefix = ""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        if type(self) not in _PARENTS:  # derived since the swap
            return cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        # A class built at run time can't be found by its name: unpickling builds it again from its two parents.
        mixin, original = swapped_parents(type(self))
        state = super().__reduce_ex__(protocol)[2]
        return _rebuild, (mixin, original), state


_Parents = tuple[type[SwappedClass], type[nn.Module]]
_TYPES: dict[_Parents, type[nn.Module]] = {}
_PARENTS: dict[type[nn.Module], _Parents] = {}


def _swapped_type(mixin: type[SwappedClass], original: type[nn.Module]) -> type[nn.Module]:
    if (mixin, original) not in _TYPES:
        name = f"{mixin.class_prefix}{original.__name__}"
        built = type(name, (mixin, original), {"__module__": mixin.__module__})
        _TYPES[mixin, original], _PARENTS[built] = built, (mixin, original)
    return _TYPES[mixin, original]


def _rebuild(mixin: type[SwappedClass], original: type[nn.Module]) -> nn.Module:
    cls = _swapped_type(mixin, original)
    return cls.__new__(cls)


def swapped_parents(cls: type[nn.Module]) -> tuple[type[SwappedClass], type[nn.Module]]:
    """Return the mixin and the original class of a class that :func:`swap_class` built, or of one derived from it.

    torch's parametrizations derive a class for each module, so what is swapped may get one later.
    """
    found = _PARENTS.get(cls)
    return found or next(_PARENTS[parent] for parent in cls.__mro__ if parent in _PARENTS)


def swap_class(module: nn.Module, mixin: type[SwappedClass]) -> None:
    """Make ``module`` an instance of ``mixin`` + its own class.

    Args:
        module: Any module that is not swapped yet.
        mixin: Subclass of :class:`SwappedClass` whose methods come first.
    """
    module.__class__ = _swapped_type(mixin, type(module))


def restore_class(module: nn.Module) -> None:
    """Give a swapped ``module`` its original class back; one that was derived since is derived from that."""
    module.__class__ = _without_mixin(type(module))


def _without_mixin(cls: type[nn.Module]) -> type[nn.Module]:
    if cls in _PARENTS:
        return _PARENTS[cls][1]
    if _PARENTS.keys().isdisjoint(cls.__mro__):
        return cls
    own = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    return type(cls.__name__, tuple(map(_without_mixin, cls.__bases__)), own)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that the user gave ``module``."""
    return swapped_parents(type(module))[1] if isinstance(module, SwappedClass) else type(module)
