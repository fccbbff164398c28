"""The run directory: the names of its files, the checkpoint format, the lock, metrics.jsonl, and loading its model.

Imports the ground, gpt.model, and gpt.data, since a run holds its tokenizer."""

from gpt.run.loading import load

__all__ = ["load"]
