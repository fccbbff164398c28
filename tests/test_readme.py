"""What the README claims: each line of its table of attention runs, and is right."""

import re
from pathlib import Path

import pytest
import torch

from kernels import attention, attention_reference, masks

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = re.findall(r"^\| .* \| `(.*attention.*\(q.*)` \|$", README, flags=re.MULTILINE)
T = 80


def even(q, k):
    return (q - k) % 2 == 0


def evaluate(line: str, fn, device: str, impl: str):
    """out of one line, and the gradients of all that is learned."""
    draw = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(shape, generator=draw).to(device).requires_grad_()

    leaves = {name: leaf(1, T, 2, 32) for name in "qkv"} | {"bias": leaf(2, 1, T), "sinks": leaf(2)}
    names = {
        "torch": torch,
        "masks": masks,
        "even": even,
        "T": T,
        "attention": lambda *args, **kwargs: fn(*args, **kwargs, **({"impl": impl} if fn is attention else {})),
        "lengths": torch.tensor([30], dtype=torch.int32, device=device),
        "layout": torch.tensor([[1, 0], [1, 1]]),
        "cu_seqlens": torch.tensor([0, 30, 31, 70], device=device),
        "slopes": torch.tensor([0.5, 0.25], device=device),
        **leaves,
    }
    out = eval(line.split(" = ")[-1].replace("\\|", "|"), names)
    loss = sum(part.square().sum() for part in (out if isinstance(out, tuple) else (out,)))
    return out, *torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)


@pytest.mark.parametrize("line", LINES)
def test_line_of_attention(line, device, monkeypatch):
    if "compile" in line:
        real = torch.compile
        monkeypatch.setattr(torch, "compile", lambda fn, **options: real(fn, backend="aot_eager", **options))
    expected = evaluate(
        line.replace("torch.compile(attention, fullgraph=True)", "attention"), attention_reference, device, ""
    )
    for impl in ("auto", "triton"):
        torch.testing.assert_close(evaluate(line, attention, device, impl), expected, rtol=2e-4, atol=2e-4)


def test_the_table_was_found():
    assert len(LINES) == 20


def test_the_drawing_names_every_file_in_its_room():
    drawing = (ROOT / "docs/architecture.md").read_text().split("```")[1]
    room, named = "", []
    for line in drawing.splitlines():
        room = line.split()[0] if re.match(r"\w+/", line) else room if line.startswith(" ") else ""
        named += [room * line.startswith(" ") + name for name in re.findall(r"[\w*]+\.py", line)]
    missing = [name for name in named if not list(ROOT.glob(name))]
    assert missing == []
    there = {path for folder in ("gpt", "kernels") for path in (ROOT / folder).glob("**/[!_]*.py")}
    assert there - {path for name in named for path in ROOT.glob(name)} == set()
