"""The decoder: GPT, its blocks, attention, MLP, norms and positions, and ModelConfig, which chooses among them.

Imports the ground and kernels. Training, sampling and conversion between formats are in other rooms.
"""

from gpt.model.attention import CausalSelfAttention
from gpt.model.config import PRESETS, ModelConfig
from gpt.model.gpt import GPT, Block
from gpt.model.mlp import MLP

__all__ = ["GPT", "MLP", "PRESETS", "Block", "CausalSelfAttention", "ModelConfig"]
