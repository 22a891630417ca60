"""Interleaved A/B benchmarks of lightning-lora against PEFT, with the same weights in one process."""

import os

# libkineto, which reports allocations to benchmarks.memory, prints two lines for each profile otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
