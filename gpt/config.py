"""What a run is made of: frozen dataclasses, filled from defaults, a preset, a TOML file and the command line.

Every value is checked when a dataclass is made, so that a Config that exists is a Config that can run.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gpt.arguments import check_fields
from gpt.errors import require
from gpt.model_config import PRESETS, ModelConfig

__all__ = [
    "PRESETS",
    "Config",
    "DataConfig",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "TokenizerConfig",
    "TrainConfig",
    "require",
]


@dataclass(frozen=True)
class DataConfig:
    """Which text, and how it is split."""

    corpus: tuple[str, ...] = ()
    """What to train on: files (text, JSON, Parquet; .gz, .zst, .bz2, .xz), directories, globs, http(s) URLs, hf:NAME
    for a Hugging Face dataset, - for stdin, python:stdlib (Python's library), or .bin files of token ids."""
    cache_dir: Path | None = None
    """Where tokenized corpora and downloads are kept; by default a folder under the user's cache folder."""
    val_fraction: float = 0.1
    """Share of the text held out for validation: the tail of one document; of several, those a seeded hash picks."""
    split_seed: int = 0
    """Seed of the hash that picks the validation documents."""
    encoding_errors: Literal["strict", "replace"] = "strict"
    """What to do with bytes that are not UTF-8: refuse, or replace them with U+FFFD."""
    text_field: str = "text"
    """The field of JSON lines, or the column of Parquet files and datasets, that holds the text."""
    max_corpus_bytes: int | None = None
    """Read at most about this many bytes of text, whole documents, in the corpus's order."""
    max_download_bytes: int = 16 << 30
    """Refuse to download a file of more bytes than this."""
    corpus_weights: tuple[float, ...] = ()
    """Shares of the training rows that each entry of corpus gives, in its order; each then has epochs and a split of
    its own. None given: the entries are one text."""
    packing: Literal["stream", "documents", "best_fit"] = "stream"
    """How documents fill training rows: as one stream of tokens; as that stream, but no token sees another document's;
    or apart likewise, and as few of them cut as can be (best-fit packing)."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(all(entry.strip() for entry in self.corpus), "corpus has an empty entry: give a path or a name")
        weights = self.corpus_weights
        require(all(0 < w < math.inf for w in weights), f"corpus_weights must be positive, not {weights}")
        require(
            len(weights) in (0, len(self.corpus)) or not self.corpus,
            f"corpus_weights has {len(weights)} numbers for {len(self.corpus)} entries of corpus: give one for each",
        )
        require(0 < self.val_fraction < 1, f"val_fraction must lie between 0 and 1, not {self.val_fraction}")
        require(self.max_corpus_bytes is None or self.max_corpus_bytes > 0, "max_corpus_bytes must be positive")
        require(self.max_download_bytes > 0, "max_download_bytes must be positive")


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes tokens."""

    tokenizer: str = "char"
    """char (the corpus's own characters), byte, bpe (trained on the corpus), or a tiktoken encoding such as gpt2."""
    bpe_vocab_size: int = 4096
    """Size of the trained BPE vocabulary, the 256 bytes and the document token included."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.bpe_vocab_size >= 257, f"bpe_vocab_size must be at least 257, not {self.bpe_vocab_size}")


@dataclass(frozen=True)
class OptimConfig:
    """How the weights move."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw for all weights; or muon for the blocks' matrices and Adam for the rest."""
    learning_rate: float = 1e-3
    """Peak rate: of every weight under adamw, of the matrices under muon."""
    embedding_lr: float = 0.05
    """Peak rate of the embeddings under muon."""
    base_width: int | None = None
    """Under adamw, the n_embd that learning_rate was found at: the rate of the matrices that grow with the width is
    multiplied by base_width / n_embd. None: one rate for all."""
    head_lr: float = 0.01
    """Peak rate of the output head, gates, norms and biases under muon."""
    min_lr: float = 0.0
    """Rate at the end of the schedule; every group ends at the same share of its peak."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """After the warm-up: a cosine; a line; stable and then linear over the last decay_fraction; or constant."""
    warmup_steps: int = 100
    """Steps over which the rate rises linearly to its peak."""
    decay_fraction: float = 0.4
    """Share of the steps that wsd decays over."""
    weight_decay: float = 0.1
    """Decoupled decay of the matrices, under adamw the embeddings too; norms and biases are left alone."""
    beta1: float = 0.9
    """Adam's decay of the first moment."""
    beta2: float = 0.95
    """Adam's decay of the second moment."""
    muon_momentum: float = 0.95
    """Muon's Nesterov momentum."""
    muon_ns_steps: int = 5
    """Newton-Schulz steps in Muon's orthogonalisation."""
    grad_clip: float = 1.0
    """The gradient's norm is clipped to this; 0 turns it off."""
    ema_decay: float = 0.0
    """Keep an exponential moving average of the weights, to evaluate and sample with; 0 turns it off."""
    z_loss: float = 0.0
    """In training, this times the square of log(sum(exp(logits))) joins the loss; PaLM has 1e-4."""
    label_smoothing: float = 0.0
    """In training, the share of each target that is spread over the whole vocabulary."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("learning_rate", "embedding_lr", "head_lr"):
            require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        require(
            0 <= self.min_lr <= self.learning_rate,
            f"min_lr must lie between 0 and learning_rate {self.learning_rate}, not {self.min_lr}",
        )
        base, kind = self.base_width, self.optimizer
        require(base is None or base >= 1, f"base_width must be at least 1, not {base}")
        require(base is None or kind == "adamw", f"base_width goes with adamw: the rates of {kind} need none")
        for name in ("warmup_steps", "weight_decay", "grad_clip", "z_loss"):
            require(getattr(self, name) >= 0, f"{name} must be at least 0, not {getattr(self, name)}")
        require(0 <= self.decay_fraction <= 1, f"decay_fraction must lie between 0 and 1, not {self.decay_fraction}")
        require(self.muon_ns_steps >= 1, f"muon_ns_steps must be at least 1, not {self.muon_ns_steps}")
        require(
            0 <= self.label_smoothing < 1, f"label_smoothing must be at least 0 and below 1, not {self.label_smoothing}"
        )
        for name in ("beta1", "beta2", "muon_momentum", "ema_decay"):
            require(0 <= getattr(self, name) < 1, f"{name} must be at least 0 and below 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class TrainConfig:
    """The loop: batches, steps, device, and where the run lives."""

    batch_size: int = 16
    """Rows per micro step and process."""
    grad_accum_steps: int = 1
    """Micro steps per optimizer step. A step sees batch_size * grad_accum_steps * processes rows."""
    max_steps: int = 2000
    """Optimizer steps."""
    seed: int = 1337
    """Seed of weights, data order, dropout and samples."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the forward pass under autocast. auto: bfloat16 where it runs on matrix units
    (GPUs from sm_80 up, CPUs with AMX), else float32."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several processes under torchrun share the work: ddp, each with all weights; fsdp, each with its part of
    weights and optimizer states. auto: ddp, or nothing for one process."""
    activation_checkpointing: bool = False
    """Keep only each block's input for the backward and compute the rest again: less memory, about a third slower."""
    eval_dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Precision of evaluations. None: that of training."""
    compile: bool = False
    """torch.compile the model: faster steps after a start of tens of seconds; on a CPU it needs a C++ compiler."""
    eval_interval: int = 250
    """Steps between evaluations; the last step is always evaluated."""
    eval_tokens: int | None = None
    """Validation tokens an evaluation reads of each corpus, always the same ones from the start. None: 262,144, and in
    the last evaluation all."""
    checkpoint_interval: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on disk."""
    max_skipped_steps: int = 10
    """A step whose loss or gradient is not finite is skipped; after this many in a row the run goes back to its last
    checkpoint, with another order of the data."""
    max_rollbacks: int = 3
    """So often a run goes back before training gives up; 0 gives up at once."""
    spike_threshold: float = 0.0
    """Skip a step as well whose loss lies this many robust standard deviations above the last ones; 0 skips none."""
    patience: int = 0
    """End after this many evaluations in a row without a lower validation loss; 0 never does."""
    max_minutes: float = 0.0
    """Finish the step and save when the process is this old, in minutes; 0 sets no limit."""
    run_dir: Path | None = None
    """The folder that holds everything of the run. None: runs/ and the config file's name."""
    init_from: str | None = None
    """Begin with the weights, the model options and the tokenizer of this: a run directory, or a Hugging Face
    checkpoint (a directory or a name). seq_len may be shorter, dropout another.
    Ignored when a run is resumed."""
    resume: bool = False
    """Go on from the run's newest checkpoint that verifies, or start where the run has none."""
    resume_from: Path | None = None
    """Go on from this checkpoint, of this run or another."""
    overwrite: bool = False
    """Delete what an earlier run left in the run directory."""
    eval_only: bool = False
    """Evaluate the newest checkpoint and stop."""
    dry_run: bool = False
    """Read the corpus, say what the run will cost (memory, tokens, FLOPs, time) and stop; the run is not touched."""
    profile_steps: int = 0
    """Trace this many of the first steps into trace.json.gz and profile.txt; 0 traces none."""

    def __post_init__(self) -> None:
        check_fields(self)
        steps = "max_steps", "eval_interval", "checkpoint_interval", "max_skipped_steps"
        for name in ("batch_size", "grad_accum_steps", "keep_checkpoints", *steps):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("profile_steps", "max_rollbacks", "patience", "spike_threshold", "max_minutes", "seed"):
            require(getattr(self, name) >= 0, f"{name} must be at least 0, not {getattr(self, name)}")
        require(self.eval_tokens is None or self.eval_tokens >= 1, "eval_tokens must be at least 1")
        source = self.init_from
        require(source is None or bool(source.strip()), "init_from is empty: give a run or a checkpoint")
        pairs = [("resume", other) for other in ("overwrite", "resume_from")]
        pairs += [("eval_only", other) for other in ("overwrite", "resume_from", "dry_run")]
        for first, second in pairs:
            contradict = bool(getattr(self, first)) and bool(getattr(self, second))
            require(not contradict, f"{first} and {second} contradict each other: give one")


@dataclass(frozen=True)
class LogConfig:
    """What the run shows."""

    log_interval: int = 10
    """Steps between lines of metrics.jsonl."""
    sample_tokens: int = 200
    """Tokens of the sample printed at each evaluation; 0 prints none."""
    sample_prompt: str = ""
    """Prompt of that sample."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases: off, offline (a folder in the run), or online."""
    wandb_project: str = "gpt"
    """Its project."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.log_interval >= 1, f"log_interval must be at least 1, not {self.log_interval}")
        require(self.sample_tokens >= 0, f"sample_tokens must be at least 0, not {self.sample_tokens}")


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
