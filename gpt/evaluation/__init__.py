"""How good a model is on a text: losses, multiple-choice questions, lm-evaluation-harness, and what int8 weights cost.

Imports the ground, gpt.model, gpt.data, gpt.run, gpt.inference and gpt.interop.
"""
