"""Text from a model.

Sampling, batches of prompts, the decoder with its cache of keys and values, speculative decoding, and linear layers for
few rows. Imports the ground, gpt.model and gpt.data; only attend.py imports kernels.
"""
