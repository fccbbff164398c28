"""Check before training that all ranks run the same code with the same options, data and weights.

Ranks that differ would silently train different models, or wait for each other forever.
"""

import functools
import hashlib
import json
import platform
from dataclasses import fields
from pathlib import Path

import torch
from torch import nn

from gpt.command_line import flag
from gpt.config import Config
from gpt.data.corpus import Corpus
from gpt.distributed import World
from gpt.errors import UserError
from gpt.option import marked
from gpt.run.layout import MANIFEST

ROOT = Path(__file__).parents[2]


def check_alike(world: World, facts: dict[str, str]) -> None:
    """Raise UserError on every rank if facts differ from rank 0's, naming them. All ranks must call it together."""
    if world.size == 1:
        return
    first, *others = map(json.loads, world.gather(json.dumps(facts)))
    different = [
        f"rank {rank} has {_clauses(theirs, first)}" for rank, theirs in enumerate(others, 1) if theirs != first
    ]
    if different:
        raise UserError(
            f"the ranks differ: {'; '.join(different)}: start all of them with the same command, code and text, "
            "and with a run directory that all of them share"
        )


def _clauses(theirs: dict[str, str], first: dict[str, str]) -> str:
    names = [name for name in {**first, **theirs} if theirs.get(name) != first.get(name)]
    return ", ".join(
        f"{name} {theirs.get(name, 'unknown')} where rank 0 has {first.get(name, 'none')}" for name in names
    )


def start_facts(config: Config) -> dict[str, str]:
    """Describe a rank's program and options."""
    facts = {"code": _code_digest(), "torch": torch.__version__, "Python": platform.python_version()}
    for part in fields(config):
        compared = marked(getattr(config, part.name), lambda rules: not rules.per_rank)
        facts |= {flag(name): str(value) for name, value in compared.items()}
    return facts


def data_facts(corpus: Corpus, checkpoint: Path | None) -> dict[str, str]:
    """Describe the text, tokenizer and checkpoint that a rank reads."""
    manifest = "" if checkpoint is None else f"{checkpoint.name} {_short((checkpoint / MANIFEST).read_bytes())}"
    return {
        "corpus": f"{corpus.digest[:12]} ({corpus.train_tokens:,} training tokens)",
        "tokenizer": f"{corpus.tokenizer.fingerprint[:12]} (vocabulary {corpus.tokenizer.vocab_size:,})",
        "checkpoint": manifest or "none",
    }


def weight_facts(model: nn.Module) -> dict[str, str]:
    """Describe the bits of a rank's weights. Waits for the device."""
    sums = [p.detach().contiguous().view(torch.int32).sum(dtype=torch.int64) for p in model.parameters()]
    return {"initial weights": _short(str(torch.stack(sums).tolist()).encode())}


@functools.cache
def _code_digest() -> str:
    """Hash all source files that training runs."""
    files = sorted([*ROOT.glob("gpt/**/*.py"), *ROOT.glob("kernels/**/*.py"), *ROOT.glob("train.py")])
    return _short(b"".join(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() for path in files))


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
