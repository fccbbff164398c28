"""The quality of a model: losses on text, multiple-choice questions, lm-evaluation-harness, and the loss due to int8.

Imports the ground, gpt.model, gpt.data, gpt.run, gpt.inference and gpt.interop.
"""
