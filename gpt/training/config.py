"""Options of the optimizer, the training loop and the log."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpt.arguments import check_fields
from gpt.errors import require
from gpt.option import option


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, learning rate and regularisation of the loss."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw for all weights, or muon for the matrices of the blocks and Adam for the rest."""
    learning_rate: float = option(1e-3, above=0)
    """Peak learning rate: of all weights with adamw, of the matrices with muon."""
    embedding_lr: float = option(0.05, above=0, acts_with=("optimizer", ("muon",)))
    """Peak learning rate of the embeddings with muon."""
    base_width: int | None = option(None, at_least=1)
    """With adamw, the n_embd that learning_rate was tuned for: the rate of the matrices that grow with the width is
    multiplied by base_width / n_embd. None: one rate for all."""
    head_lr: float = option(0.01, above=0, acts_with=("optimizer", ("muon",)))
    """Peak learning rate of the output head, gates, norms and biases with muon."""
    min_lr: float = option(0.0, at_least=0, acts_with=("schedule", ("cosine", "linear", "wsd")))
    """Learning rate at the end of the schedule; all groups end at the same fraction of their peak."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Learning rate after the warm-up: cosine or linear decay; wsd: constant, then linear decay over the last
    decay_fraction; or constant."""
    warmup_steps: int = option(100, at_least=0)
    """Steps over which the learning rate rises linearly to its peak."""
    decay_fraction: float = option(0.4, at_least=0, at_most=1, acts_with=("schedule", ("wsd",)))
    """Fraction of all steps over which wsd decays."""
    weight_decay: float = option(0.1, at_least=0)
    """Decoupled weight decay of the matrices, with adamw also of the embeddings, never of norms and biases."""
    beta1: float = option(0.9, at_least=0, below=1)
    """Adam's decay rate of the first moment."""
    beta2: float = option(0.95, at_least=0, below=1)
    """Adam's decay rate of the second moment."""
    muon_momentum: float = option(0.95, at_least=0, below=1, acts_with=("optimizer", ("muon",)))
    """Muon's Nesterov momentum."""
    muon_ns_steps: int = option(5, at_least=1, acts_with=("optimizer", ("muon",)))
    """Newton-Schulz iterations of Muon."""
    grad_clip: float = option(1.0, at_least=0)
    """Clip the norm of the gradient to this; 0 turns clipping off."""
    ema_decay: float = option(0.0, at_least=0, below=1)
    """Keep an exponential moving average of the weights with this decay, and evaluate and sample with it; 0 turns it
    off."""
    z_loss: float = option(0.0, at_least=0)
    """Add this times log(sum(exp(logits))) squared to the training loss; PaLM uses 1e-4."""
    label_smoothing: float = option(0.0, at_least=0, below=1)
    """In training, spread this fraction of each target over the whole vocabulary."""

    def __post_init__(self) -> None:
        check_fields(self)
        most = self.learning_rate
        require(self.min_lr <= most, f"min_lr must be at most learning_rate {most}, not {self.min_lr}")
        adamw = self.base_width is None or self.optimizer == "adamw"
        require(adamw, f"base_width goes with adamw: the rates of {self.optimizer} do not depend on the width")


@dataclass(frozen=True)
class TrainConfig:
    """Batches, steps, device and run directory."""

    batch_size: int = option(16, at_least=1, in_recipe=True)
    """Rows in a micro-batch of one process."""
    grad_accum_steps: int = option(1, at_least=1, in_recipe=True)
    """Micro-batches in a step. A step sees batch_size * grad_accum_steps * processes rows."""
    max_steps: int = option(2000, at_least=1, in_recipe=True)
    """Optimizer steps."""
    seed: int = option(1337, at_least=0, is_wide=True)
    """Seed of the initial weights, the order of the data, dropout and samples."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", in_recipe=True)
    """Precision of the forward pass, by autocast. auto: bfloat16 on GPUs from sm_80 up and on CPUs with AMX, float32
    elsewhere."""
    parallel: Literal["auto", "ddp", "fsdp"] = option("auto", per_start=True)
    """How processes under torchrun share the work. ddp: each holds all weights; fsdp: each holds a part of the weights
    and optimizer states. auto: ddp, or none for a single process."""
    activation_checkpointing: bool = False
    """Keep only the input of each block for the backward pass and recompute the rest: less memory, about a third
    slower."""
    eval_dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Precision of evaluations. None: dtype."""
    compile: bool = False
    """Compile the model with torch.compile: faster steps after tens of seconds at startup. On a CPU it needs a C++
    compiler."""
    eval_interval: int = option(250, at_least=1)
    """Steps between evaluations; the last step is always evaluated."""
    eval_tokens: int | None = option(None, at_least=1, is_wide=True)
    """Validation tokens that an evaluation reads of each corpus, always the same ones, from the start. None: 262,144,
    and all of them in the last evaluation."""
    checkpoint_interval: int = option(500, at_least=1)
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = option(2, at_least=1)
    """Number of newest checkpoints to keep."""
    max_skipped_steps: int = option(10, at_least=1)
    """A step whose loss or gradient is not finite is skipped. After this many skipped steps in a row, the run rolls
    back to its last checkpoint and reads the data in another order."""
    max_rollbacks: int = option(3, at_least=0)
    """Give up after this many rollbacks; 0 gives up instead of rolling back."""
    spike_threshold: float = option(0.0, at_least=0)
    """Also skip a step whose loss is this many robust standard deviations above the recent losses; 0 skips none."""
    patience: int = option(0, at_least=0)
    """Stop after this many evaluations in a row without a lower validation loss; 0 never does."""
    max_minutes: float = option(0.0, at_least=0)
    """Save and stop when the process has run for this many minutes; 0 sets no limit."""
    run_dir: Path | None = option(None, per_rank=True)
    """Directory of everything that the run writes. None: runs/NAME, where NAME is that of the config file."""
    init_from: str | None = option(None, is_path=True, per_rank=True)
    """Start from the weights, model options and tokenizer of a run directory or a Hugging Face checkpoint (a directory
    or a name). A shorter seq_len and another dropout are allowed. Ignored when resuming."""
    resume: bool = option(False, per_start=True, contradicts=("overwrite", "resume_from"))
    """Resume from the newest valid checkpoint of the run directory, or start if it has none."""
    resume_from: Path | None = option(None, per_start=True, per_rank=True)
    """Resume from this checkpoint, of this run or of another."""
    overwrite: bool = option(False, per_start=True)
    """Delete the earlier run in the run directory."""
    eval_only: bool = option(False, per_start=True, contradicts=("overwrite", "resume_from", "dry_run"))
    """Evaluate the newest checkpoint and exit."""
    dry_run: bool = option(False, per_start=True)
    """Read the corpus, print what the run will cost (memory, tokens, FLOPs, time) and exit; write nothing to the run
    directory."""
    profile_steps: int = option(0, at_least=0)
    """Trace this many of the first steps into trace.json.gz and profile.txt; 0 traces none."""

    def __post_init__(self) -> None:
        check_fields(self)
        source = self.init_from
        require(source is None or bool(source.strip()), "init_from is empty: give a run or a checkpoint")


@dataclass(frozen=True)
class LogConfig:
    """What the run reports."""

    log_interval: int = option(10, at_least=1)
    """Steps between lines of metrics.jsonl."""
    sample_tokens: int = option(200, at_least=0)
    """Tokens of the sample that each evaluation prints; 0 prints none."""
    sample_prompt: str = option("", may_be_empty=True)
    """Prompt of that sample."""
    wandb: Literal["off", "offline", "online"] = option("off", per_rank=True)
    """Weights & Biases: off, offline (a folder in the run directory), or online."""
    wandb_project: str = option("gpt", acts_with=("wandb", ("offline", "online")), per_rank=True)
    """Project on Weights & Biases."""

    def __post_init__(self) -> None:
        check_fields(self)
