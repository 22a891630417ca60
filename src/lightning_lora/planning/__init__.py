"""Plan the memory of a run before anything is allocated."""

from lightning_lora.planning.batches import TokenBatch
from lightning_lora.planning.memory_plan import BaseMemory, MemoryPlan
from lightning_lora.planning.optimizer_state import OptimizerMemory
from lightning_lora.planning.plan import plan_memory

__all__ = ["BaseMemory", "MemoryPlan", "OptimizerMemory", "TokenBatch", "plan_memory"]
