"""The position-wise feed-forward layer."""

from torch import Tensor, nn

from gpt.model.config import ModelConfig
from gpt.model.linear import ActivatedLinear, ResidualLinear


class MLP(nn.Module):
    """residual + dropout(W2 activation(W1 x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = config.activation
        gates = 2 if config.activation == "swiglu" else 1
        self.c_fc = ActivatedLinear(config.n_embd, gates * config.mlp_width, bias=config.bias)
        self.c_proj = ResidualLinear(config.mlp_width, config.n_embd, bias=config.bias, dropout=config.dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.c_proj(self.c_fc(x, activation=self.activation), residual=residual)
