"""Maps weight names between our models and Hugging Face checkpoints, for import and export."""

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt.errors import UserError
from gpt.files import utf8_path
from gpt.folders import instead
from gpt.model import GPT, ModelConfig

log = logging.getLogger(__name__)

_TABLE = "model.embed_tokens.weight"
INDEX = "model.safetensors.index.json"
# Tables beside the weights of older checkpoints. transformers ignores them, whatever they hold.
_TABLES = re.compile(r"(?:transformer\.)?h\.\d+\.attn\.(bias|masked_bias)|(?:.+\.)?rotary_emb\.(inv_freq)")


@dataclass(frozen=True)
class Match:
    """One of our weights and the weights of the checkpoint that hold its rows.

    theirs: their names; none for a norm without a weight, and ours is then 1. sizes: the rows that each holds.
    transposed: inputs come first, as in GPT-2's Conv1D. equal: all are copies of ours. halves: how many heads have the
    two halves of their rows swapped, and the head width.
    """

    ours: str
    theirs: tuple[str, ...]
    sizes: tuple[int, ...] = ()
    transposed: bool = False
    equal: bool = False
    halves: tuple[int, int] | None = None


def matches(family: str, config: ModelConfig) -> Iterator[Match]:
    """Yield the match of every weight of a GPT of this config in the family's checkpoint."""
    yield from _gpt2(config) if family == "gpt2" else _llama(family, config)
    if not config.tied_embeddings:
        yield Match("head.weight", ("lm_head.weight",))


def _gpt2(config: ModelConfig) -> Iterator[Match]:
    names = {"attn_norm": "ln_1", "mlp_norm": "ln_2", "attn.c_qkv": "attn.c_attn"}
    names |= {name: name for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    yield Match("embed.weight", ("transformer.wte.weight",))
    yield Match("position_embed.weight", ("transformer.wpe.weight",))
    for kind in ("weight", "bias"):
        yield Match(f"norm.{kind}", (f"transformer.ln_f.{kind}",))
        for i in range(config.n_layer):
            for ours, theirs in names.items():
                transposed = kind == "weight" and "norm" not in ours
                match = f"blocks.{i}.{ours}.{kind}", (f"transformer.h.{i}.{theirs}.{kind}",)
                yield Match(*match, transposed=transposed)


def _llama(family: str, config: ModelConfig) -> Iterator[Match]:
    """Yield the matches of Llama and its relatives: separate projections, RMSNorm, a gate.

    nanochat has neither weights of norms nor a gate.
    """
    H, H_kv, D = config.n_head, config.kv_heads, config.head_width
    bare = family == "nanochat"

    def norm(ours: str, theirs: str) -> Match:
        return Match(f"{ours}.weight", () if bare else (f"{theirs}.weight",))

    yield Match("embed.weight", (_TABLE,))
    yield norm("norm", "model.norm")
    for i in range(config.n_layer):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        yield norm(f"{ours}.attn_norm", f"{theirs}.input_layernorm")
        yield norm(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm")
        if config.qk_norm:
            yield norm(f"{ours}.attn.q_norm", f"{theirs}.self_attn.q_norm")
            yield norm(f"{ours}.attn.k_norm", f"{theirs}.self_attn.k_norm")
        for kind in ("weight", "bias") if config.bias else ("weight",):
            names = tuple(f"{theirs}.self_attn.{x}_proj.{kind}" for x in "qkv")
            # nanochat turns rotary positions the other way round; with the halves swapped the scores are the same.
            halves = (H + H_kv, D) if bare else None
            yield Match(f"{ours}.attn.c_qkv.{kind}", names, (H * D, H_kv * D, H_kv * D), halves=halves)
            yield Match(f"{ours}.attn.c_proj.{kind}", (f"{theirs}.self_attn.o_proj.{kind}",))
            if bare:
                yield Match(f"{ours}.mlp.c_fc.{kind}", (f"{theirs}.mlp.fc1.{kind}",))
                yield Match(f"{ours}.mlp.c_proj.{kind}", (f"{theirs}.mlp.fc2.{kind}",))
                continue
            gated = tuple(f"{theirs}.mlp.{x}_proj.{kind}" for x in ("gate", "up"))
            if config.activation == "relu2":
                yield Match(f"{ours}.mlp.c_fc.{kind}", gated, equal=True)
            else:
                yield Match(f"{ours}.mlp.c_fc.{kind}", gated, (config.mlp_width, config.mlp_width))
            yield Match(f"{ours}.mlp.c_proj.{kind}", (f"{theirs}.mlp.down_proj.{kind}",))


class WeightFiles:
    """The tensors of a checkpoint's safetensors files, one file or several with an index, read on demand.

    unread: the file of each tensor that has not been taken. Raises UserError if there is no file, or one is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.unread = folder, {}
        self._files, listed = {}, self._listed()
        for name in sorted(set(listed.values())) or ["model.safetensors"]:
            path = folder / name
            try:
                with utf8_path(path) as readable:
                    self._files[name] = safe_open(readable, "pt")
                for tensor in self._files[name].keys():  # noqa: SIM118 - it is not a dict
                    if (other := self.unread.setdefault(tensor, name)) != name:
                        raise UserError(f"{folder} holds {tensor} in two files, {other} and {name}: delete one of them")
            except (OSError, SafetensorError) as error:
                raise UserError(f"cannot read {path}: {error}") from None
        if lost := [tensor for tensor, name in listed.items() if self.unread.get(tensor) != name]:
            raise UserError(f"{folder / INDEX} says that {lost[0]} is in {listed[lost[0]]}, but it is not")

    def _listed(self) -> dict[str, str]:
        """Read each tensor's file from the index; {} if there is only one file."""
        single = (self.folder / "model.safetensors").exists()
        if (self.folder / INDEX).exists():
            if single:
                raise UserError(f"{self.folder} holds model.safetensors and {INDEX}: delete the wrong one")
            try:
                listed = dict(json.loads((self.folder / INDEX).read_bytes())["weight_map"])
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(f"{self.folder / INDEX} is not an index of safetensors files: {error!r}") from None
            if not all(isinstance(name, str) and Path(name).name == name for name in listed.values()):
                raise UserError(f"{self.folder / INDEX} names files outside its directory")
            if not listed:
                raise UserError(f"{self.folder / INDEX} names no weights")
            return listed
        if single:
            return {}
        hint = instead(self.folder)
        raise UserError(f"{self.folder} has no weights: there is no model.safetensors" + (f"; {hint}" if hint else ""))

    def take(self, name: str, prefix: str) -> Tensor | None:
        """Read a tensor once; None if missing. Its name may lack the prefix, as in checkpoints of the bare decoder."""
        found = self.find(name, prefix)
        if found is None:
            return None
        tensor = self.read(found)
        del self.unread[found]
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise UserError(
                f"{self.folder}: {found} has the type {tensor.dtype}: only full weights (16 bits or more) are supported"
            )
        if not tensor.isfinite().all():
            raise UserError(f"{self.folder}: {found} holds NaN or infinity: use an earlier checkpoint")
        return tensor

    def find(self, name: str, prefix: str) -> str | None:
        """Return a tensor's name, with or without the prefix, if it has not been taken."""
        return next((n for n in (name, name.removeprefix(prefix)) if n in self.unread), None)

    def read(self, name: str) -> Tensor:
        """Read a tensor that has not been taken, by the name in the file."""
        file = self.unread[name]
        try:
            return self._files[file].get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"cannot read {name} in {self.folder / file}: {error}") from None


def has_other_head(folder: Path, family: str) -> bool:
    """Whether a checkpoint holds a head that differs from its embedding table."""
    try:
        tensors = WeightFiles(folder)
    except UserError:  # copy_from reports it
        return False
    table, prefix = ("transformer.wte.weight", "transformer.") if family == "gpt2" else (_TABLE, "model.")
    name = tensors.find(table, prefix)
    if name is None or "lm_head.weight" not in tensors.unread:
        return False
    head, rows = tensors.read("lm_head.weight"), tensors.read(name)
    wider = torch.promote_types(head.dtype, rows.dtype)
    return head.shape != rows.shape or not torch.equal(head.to(wider), rows.to(wider))


def _swap_halves(rows: Tensor, heads: int, width: int) -> Tensor:
    """Swap the two halves of each of the first `heads` heads in the rows of queries, keys and values."""
    turned, rest = rows[: heads * width], rows[heads * width :]
    turned = turned.view(heads, 2, width // 2, *rows.shape[1:]).flip(1).reshape(turned.shape)
    return torch.cat((turned, rest))


def biased(family: str, given: dict[str, Any]) -> set[str]:
    """Return the names of the modules that have a bias, by the options `given` in config.json."""
    if family == "gpt2":
        return {"c_attn", "c_proj", "c_fc", "ln_1", "ln_2", "ln_f"}
    if family == "qwen2":
        return {"q_proj", "k_proj", "v_proj"}
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"} if given["attention_bias"] else set()
    return attention | ({"gate_proj", "up_proj", "down_proj"} if family == "llama" and given["mlp_bias"] else set())


@torch.no_grad()
def copy_from(folder: Path, family: str, model: GPT, biases: set[str], positions: int) -> None:
    """Copy a checkpoint's weights into a model of config_from_hf. A position table is cut to the model's context.

    biases: the checkpoint's modules with a bias; ours are zeros elsewhere. positions: rows of its position table.
    Raises UserError for a weight that is missing, has another shape, or is not in the model.
    """
    config, tensors, weights = model.config, WeightFiles(folder), dict(model.named_parameters())
    prefix = "transformer." if family == "gpt2" else "model."
    for match in matches(family, config):
        weight = weights.pop(match.ours)
        if not match.theirs:
            weight.fill_(1.0)
            continue
        parts, sizes = [], match.sizes or (len(weight),) * len(match.theirs)
        for size, name in zip(sizes, match.theirs, strict=True):
            if name.endswith(".bias") and name.split(".")[-2] not in biases:
                parts.append(torch.zeros(size))
                continue
            if (part := tensors.take(name, prefix)) is None:
                raise UserError(f"{folder} lacks the weight {name}")
            table = match.ours == "position_embed.weight"
            wanted = (positions if table else size, *weight.shape[1:])
            wanted = wanted[::-1] if match.transposed else wanted
            if part.shape != wanted:
                raise UserError(f"{folder}: {name} has shape {tuple(part.shape)}, not {wanted}")
            parts.append(part.T if match.transposed else part[:size])
        if match.equal and not torch.equal(parts[0], parts[1]):
            raise UserError(
                f"{folder} has a ReLU that gates another projection: only ReLU^2, where both are equal, fits"
            )
        rows = parts[0] if len(parts) == 1 or match.equal else torch.cat(parts)
        weight.copy_(rows if match.halves is None else _swap_halves(rows, *match.halves))
    if family == "nanochat":  # fold the norm after the table into the table
        embed = model.embed.weight
        embed.mul_(embed.square().mean(-1, keepdim=True).add_(config.norm_eps).rsqrt_())
    if config.tied_embeddings and "lm_head.weight" in tensors.unread:  # has_other_head compared it
        del tensors.unread["lm_head.weight"]
    left = [name for name in tensors.unread if not _TABLES.fullmatch(name)]
    odd = [name for name in tensors.unread if name not in left and not _usual(name, tensors.read(name), config)]
    if odd:
        log.warning("%s: %s differs from what its options make it, and is ignored", folder, odd[0])
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise UserError(f"{folder} holds weights that this model lacks: {', '.join(left[:3])}{more}")


def _usual(name: str, table: Tensor, config: ModelConfig) -> bool:
    """Whether a table beside the weights equals the one that the model computes."""
    kind = next(filter(None, _TABLES.fullmatch(name).groups()))
    if kind == "bias":  # the keys that a query attends to
        rows = table.squeeze().float()
        return rows.ndim == 2 and torch.equal(rows, torch.ones_like(rows).tril())
    if kind == "masked_bias":  # the score of the other keys
        return table.numel() == 1 and float(table) <= -1e4
    exponents = torch.arange(0, config.head_width, 2, dtype=torch.float64) / config.head_width
    expected = config.rope_theta**-exponents
    return table.shape == expected.shape and torch.allclose(table.double(), expected, rtol=1e-2)


@torch.no_grad()
def tensors_for(family: str, model: GPT, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the model's weights under the family's names. Biases that the model lacks are zeros."""
    state, found = dict(model.named_parameters()), {}
    for match in matches(family, model.config):
        if not match.theirs:
            continue
        if match.ours in state:
            rows = state[match.ours].detach().cpu()
        else:
            rows = torch.zeros(len(state[match.ours.removesuffix("bias") + "weight"]))
        rows = rows if match.halves is None else _swap_halves(rows, *match.halves)
        parts = [rows] * len(match.theirs) if match.equal else rows.split(match.sizes or (len(rows),))
        for name, part in zip(match.theirs, parts, strict=True):
            found[name] = (part.T if match.transposed else part).to(dtype).contiguous().clone()
    if family == "nanochat":
        # nanochat's norm turns a row of scale sqrt(eps / (1 - s)) into a row of mean square s, which ours has.
        embed = model.embed.weight.detach().cpu()
        rest = 1 - embed.double().square().mean(-1, keepdim=True)
        scale = (model.config.norm_eps / rest.clamp(min=1e-7)).sqrt()
        found[_TABLE] = (embed * scale).to(dtype)
    return found


def fits_nanochat(model: GPT) -> list[str]:
    """List what in a model's weights nanochat, whose norms have no weights, cannot hold."""
    state, faults = dict(model.named_parameters()), []
    if not all(torch.all(state[p.ours] == 1) for p in matches("nanochat", model.config) if not p.theirs):
        faults.append("norms with weights other than 1")
    if model.embed.weight.square().mean(-1).max() > 1 + 1e-5:
        faults.append("embeddings whose root mean square is above 1")
    return faults
