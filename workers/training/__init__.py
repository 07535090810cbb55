"""Trains models: the recipe of `crack-tiny`, and adapters for any checkpoint. Knows nothing of jobs or queues."""
