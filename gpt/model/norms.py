"""RMSNorm and LayerNorm."""

import torch.nn.functional as F
from torch import Tensor, nn

from gpt.model.config import ModelConfig
from gpt.model.cpu_autograd import RMSNormFunction, by_hand


class RMSNorm(nn.RMSNorm):
    """Zhang & Sennrich 2019. The weight is cast to the input's dtype, so that a GPU can use its fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if by_hand(x):
            return RMSNormFunction.apply(x, weight, self.eps)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    """Make the RMSNorm or LayerNorm (Ba et al. 2016) that a config asks for."""
    if config.norm == "rmsnorm":
        return RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)
