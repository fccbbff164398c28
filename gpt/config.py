"""What a run is made of: frozen dataclasses, filled from defaults, a preset, a TOML file and the command line.

Every value is checked when a dataclass is made, so that a Config that exists is a Config that can run.
"""

from dataclasses import dataclass, field

from gpt.arguments import check_fields
from gpt.data.config import DataConfig, TokenizerConfig
from gpt.model.config import PRESETS, ModelConfig
from gpt.training.config import LogConfig, OptimConfig, TrainConfig

__all__ = [
    "PRESETS",
    "Config",
    "DataConfig",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "TokenizerConfig",
    "TrainConfig",
]


@dataclass(frozen=True)
class Config:
    """Everything of a run. The TOML tables are the fields' names."""

    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        check_fields(self)
