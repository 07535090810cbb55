"""Trains models: the recipe of `crack-tiny`, and LCM-LoRA and style adapters for any checkpoint. Knows nothing of jobs or queues."""
