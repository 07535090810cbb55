"""Trains models: the recipe of `crack-tiny` and LCM-LoRA distillation. Knows nothing of jobs or queues."""
