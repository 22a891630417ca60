"""The error tree.

Every error that this package raises about a run derives from :class:`LightningLoRAError` *and* from the built-in that
fits, so ``except RuntimeError`` of existing code keeps working::

    LightningLoRAError
    ├── TargetNotFoundError (ValueError)        a pattern that selects nothing, or only layers that cannot be adapted
    ├── CheckpointError (RuntimeError)          a file that cannot be read, or is no adapter checkpoint
    ├── AdapterMismatchError (RuntimeError)     adapters of a file and of the module differ
    │   └── BaseMismatchError                   the file was trained on another base
    ├── QuantizationError (RuntimeError)        a base that cannot be stored in fewer bits, or no longer is rightly
    ├── MergeError (RuntimeError)               a merge that would not be right
    ├── UnsupportedSetupError (RuntimeError)    a Trainer, module or callback arrangement that would be silently wrong
    └── MissingDependencyError (ImportError)    an optional package is needed

A bad value in a config object is a plain ``ValueError`` (or ``TypeError``) at construction.
"""

from __future__ import annotations


class LightningLoRAError(Exception):
    """Base of all errors that lightning_lora raises about a run."""


class TargetNotFoundError(LightningLoRAError, ValueError):
    """A target pattern selects no layer that can be adapted."""


class CheckpointError(LightningLoRAError, RuntimeError):
    """A checkpoint or adapter file is damaged, unreadable, or not one of ours."""


class AdapterMismatchError(LightningLoRAError, RuntimeError):
    """The adapters in a file are not the adapters of the module."""


class BaseMismatchError(AdapterMismatchError):
    """The adapters in a file were trained on another base than the module's."""


class QuantizationError(LightningLoRAError, RuntimeError):
    """A base that cannot be stored in fewer bits, or whose codes are not what they were."""


class MergeError(LightningLoRAError, RuntimeError):
    """A merge that would be wrong, or that cannot be undone."""


class UnsupportedSetupError(LightningLoRAError, RuntimeError):
    """A combination of Trainer, module and callbacks that would train or save the wrong thing."""


class MissingDependencyError(LightningLoRAError, ImportError):
    """An optional dependency is not installed; the message names the command that installs it."""
