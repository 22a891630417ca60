"""The Hydra config groups of lightning-lora, served as ``pkg://lightning_lora.conf``."""
