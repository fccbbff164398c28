"""A GPT: a decoder-only language model to train on your own text and to generate text with.

model, tokenizer = gpt.load("runs/x")
for piece in gpt.generate(model, tokenizer, ["ROMEO:"], gpt.SamplingConfig(max_new_tokens=200)):
    print(piece.text, end="")

Functions and options raise UserError, a ValueError, for a wrong argument; models, caches and tokenizers raise TypeError
or ValueError. The message names the argument.
"""

import os

# libgomp's threads spin for milliseconds while they wait for each other. On a busy core the spinning blocks the very
# thread they wait for. Must be set before torch loads libgomp.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from gpt.config import PRESETS, Config, ModelConfig
from gpt.errors import UserError
from gpt.inference.generation import Piece, generate
from gpt.inference.sampling import SamplingConfig
from gpt.interop.hf_config import from_hf, tokenizer_from_hf
from gpt.model import GPT
from gpt.run import load

__all__ = [
    "GPT",
    "PRESETS",
    "Config",
    "ModelConfig",
    "Piece",
    "SamplingConfig",
    "UserError",
    "from_hf",
    "generate",
    "load",
    "tokenizer_from_hf",
]
