"""What the machine of a test has."""

from __future__ import annotations

import pytest

from lightning_lora import MissingDependencyError
from lightning_lora.fused.amx import find_amx

try:
    AMX = find_amx()
except MissingDependencyError:
    AMX = None
has_amx = pytest.mark.skipif(AMX is None, reason="needs a CPU with AMX, and g++ 11")
