"""The decoder: GPT, its blocks, attention, MLP, norms and positions, and ModelConfig, which chooses among them.

Imports the ground and kernels. How these modules train, sample or move between formats is the other rooms' work.
"""

from gpt.model.attention import CausalSelfAttention
from gpt.model.config import PRESETS, ModelConfig
from gpt.model.gpt import GPT, Block
from gpt.model.mlp import MLP

__all__ = ["GPT", "MLP", "PRESETS", "Block", "CausalSelfAttention", "ModelConfig"]
