"""Batches through transformers' own `generate`."""
