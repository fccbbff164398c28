"""Text from a model.

Sampling, batches of prompts, the decoder with its cache of keys and values, speculation, and linear layers prepared for
a few rows. Imports the ground, gpt.model and gpt.data; only attend.py imports kernels.
"""
