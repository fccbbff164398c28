"""What README and docs claim: README stays short, links lead somewhere, and each example of attention is correct."""

import re
from pathlib import Path

import pytest
import torch

from kernels import attention, attention_reference, masks

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ATTENTION_PAGE = (ROOT / "docs/attention.md").read_text(encoding="utf-8")
CALLS = re.findall(r"^\| .* \| `(.*attention.*\(q.*)` \|$", ATTENTION_PAGE, flags=re.MULTILINE)
T = 80


def even(q, k):
    return (q - k) % 2 == 0


def evaluate(call: str, fn, device: str, impl: str):
    """Run one call; its output, and the gradients of every learned tensor."""
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
    out = eval(call.split(" = ")[-1].replace("\\|", "|"), names)
    loss = sum(part.square().sum() for part in (out if isinstance(out, tuple) else (out,)))
    return out, *torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)


@pytest.mark.parametrize("call", CALLS)
def test_each_attention_example_equals_the_reference(call, device, monkeypatch):
    if "compile" in call:
        real = torch.compile
        monkeypatch.setattr(torch, "compile", lambda fn, **options: real(fn, backend="aot_eager", **options))
    expected = evaluate(
        call.replace("torch.compile(attention, fullgraph=True)", "attention"), attention_reference, device, ""
    )
    for impl in ("auto", "triton"):
        torch.testing.assert_close(evaluate(call, attention, device, impl), expected, rtol=2e-4, atol=2e-4)


def test_all_attention_examples_were_found():
    assert len(CALLS) == 20


def test_readme_has_at_most_150_lines():
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 150


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_existing_files_and_headings(page):
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8"))
    assert links or page.name != "README.md"
    for file, anchor in links:
        target = page.parent / file if file else page
        assert target.is_file(), f"{page.name} links to {file}, which does not exist"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {file}#{anchor}, an unknown heading"


def test_the_drawing_names_every_file_in_its_room():
    drawing = (ROOT / "docs/architecture.md").read_text().split("```")[1]
    room, named = "", []
    for line in drawing.splitlines():
        room = line.split()[0] if re.match(r"\w+/", line) else room if line.startswith(" ") else ""
        named += [room * line.startswith(" ") + name for name in re.findall(r"[\w*]+\.py", line)]
    assert [name for name in named if not list(ROOT.glob(name))] == []
    files = {path for folder in ("gpt", "kernels") for path in (ROOT / folder).glob("**/[!_]*.py")}
    assert files - {path for name in named for path in ROOT.glob(name)} == set()


def test_files_and_names_on_the_architecture_page_exist():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").split("```")[2]
    paths = [
        *ROOT.glob("*.py"),
        *(path for room in ("gpt", "kernels", "tests") for path in ROOT.glob(f"{room}/**/*.py")),
    ]
    program = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    files = [path.relative_to(ROOT).as_posix() for path in paths]
    for name in re.findall(r"`([\w./]+)`", page):
        if name.endswith(".py"):
            assert any(file == name or file.endswith(f"/{name}") for file in files), f"no file {name}"
        elif name.endswith("/") or "/" in name:
            assert (ROOT / name).is_dir(), f"no folder {name}"
        else:
            assert re.search(rf"\b{name.rpartition('.')[2]}\b", program), f"no {name} in any file"


def test_every_make_target_is_in_the_testing_page():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1].split()
    page = (ROOT / "docs/testing.md").read_text(encoding="utf-8")
    assert [
        target for target in targets if not re.search(rf"^\| `make {target}` \| .+ \| .+ \|$", page, re.MULTILINE)
    ] == []
