"""The configuration of a run: frozen dataclasses filled from defaults, a preset, a TOML file and the command line.

Every dataclass checks its values when it is created, so every Config is valid.
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
    """All options of a run. Each field is a table of the TOML file."""

    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        check_fields(self)
