"""Doctests import every module; where Triton is not to be had (macOS, Windows), not the one that needs it.

pytest's own --doctest-ignore-import-errors would also turn a test file that can't be imported into one that is skipped.
"""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("triton") else ["src/lightning_lora/fused/kernels.py"]
