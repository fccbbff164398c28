"""Options of the optimizer, the loop and the log."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpt.arguments import check_fields
from gpt.errors import require


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
