"""Put a function in front of a method of one object, and take it away again.

``functools.partial`` of a module-level function is the form that Lightning's ``is_overridden`` understands, that
pickles, and that a deep copy binds to the copy. A closure keeps using the original, a callable object breaks
``is_overridden``, and a ``MethodType`` does not pickle.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def patch(target: Any, name: str, function: Callable[..., Any], *args: Any) -> None:
    """Make ``target.name(...)`` call ``function(target, previous, *args, ...)``; does nothing if it does already.

    ``previous`` is what stood in the object's ``__dict__``, usually None; see :func:`original`.
    """
    if not is_patched(target, name, function):
        target.__dict__[name] = functools.partial(function, target, target.__dict__.get(name), *args)


def unpatch(target: Any, name: str, function: Callable[..., Any]) -> None:
    """Undo :func:`patch`; does nothing if it is not in force."""
    if is_patched(target, name, function):
        previous = target.__dict__.pop(name).args[1]
        if previous is not None:
            target.__dict__[name] = previous


def is_patched(target: Any, name: str, function: Callable[..., Any]) -> bool:
    """Whether :func:`patch` with this function is in force."""
    current = target.__dict__.get(name)
    return isinstance(current, functools.partial) and current.func is function


def original(target: Any, name: str, previous: Callable[..., Any] | None) -> Callable[..., Any]:
    """What ``target.name`` was before the patch."""
    return previous if previous is not None else functools.partial(getattr(type(target), name), target)
