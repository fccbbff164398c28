"""The position-wise feed-forward layer."""

import torch.nn.functional as F
from torch import Tensor, nn

from gpt.model.config import ModelConfig
from gpt.model.cpu_autograd import ReLUSquaredFunction, by_hand


class MLP(nn.Module):
    """Position-wise feed-forward: GELU, ReLU, ReLU^2 (So et al. 2021) or SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = config.activation
        gates = 2 if config.activation == "swiglu" else 1
        self.c_fc = nn.Linear(config.n_embd, gates * config.mlp_width, bias=config.bias)
        self.c_proj = nn.Linear(config.mlp_width, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.c_fc(x)
        if self.activation == "swiglu":
            gate, up = h.chunk(2, dim=-1)
            h = F.silu(gate) * up
        elif self.activation == "relu2":
            h = ReLUSquaredFunction.apply(h) if by_hand(h) else F.relu(h).square()
        elif self.activation == "relu":
            h = F.relu(h)
        else:
            h = F.gelu(h, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return self.c_proj(h)
