"""Ranks that differ all report it in one sentence before they compute anything."""

import hashlib
import re
import subprocess
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gpt import distributed
from gpt.config import Config
from gpt.distributed import World
from gpt.errors import UserError
from gpt.model import GPT
from gpt.training import ranks
from gpt.training.command import load_config
from gpt.training.ranks import check_alike, data_facts, start_facts, weight_facts
from tests.test_distributed import LAUNCH, ROOT, environment, flags
from tests.train_checks import TEXT
from tests.train_checks import flags as other_flags


class Together(World):
    """A world whose ranks gather these texts."""

    def __init__(self, *texts: str):
        super().__init__(torch.device("cpu"), 0, len(texts))
        object.__setattr__(self, "texts", texts)

    def gather(self, text: str) -> list[str]:
        return list(self.texts)


def test_all_differences_are_in_one_sentence():
    check_alike(Together('{"a": "1"}', '{"a": "1"}'), {})
    check_alike(World(torch.device("cpu")), {"a": "1"})
    with pytest.raises(UserError) as error:
        check_alike(Together('{"a": "1", "b": "2"}', '{"a": "1", "b": "2"}', '{"a": "3", "b": "4"}'), {})
    assert "the ranks differ: rank 2 has a 3 where rank 0 has 1, b 4 where rank 0 has 2: start all of" in str(
        error.value
    )
    with pytest.raises(UserError, match=r"rank 1 has a 2 where rank 0 has 1; rank 2 has a unknown where rank 0 has 1:"):
        check_alike(Together('{"a": "1"}', '{"a": "2"}', "{}"), {})


def test_weights_are_compared_by_a_hash():
    """The hash is of the sums of their bits as integers."""
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -1.0], [0.0, 0.5]]))
        model.bias.copy_(torch.tensor([2.0, -0.0]))
    one, minus_one, half, two, minus_zero = 0x3F800000, 0xBF800000 - 2**32, 0x3F000000, 0x40000000, -(2**31)
    words = str([one + minus_one + half, two + minus_zero])
    assert weight_facts(model) == {"initial weights": hashlib.sha256(words.encode()).hexdigest()[:12]}


def test_every_option_that_affects_training_is_compared():
    config = load_config(other_flags())
    facts = start_facts(config)
    names = {option.name for part in fields(Config) for option in fields(getattr(config, part.name))}
    flags_compared = {name.removeprefix("--").replace("-", "_") for name in facts if name.startswith("--")}
    assert flags_compared == names - {
        "corpus",
        "cache_dir",
        "run_dir",
        "init_from",
        "resume_from",
        "wandb",
        "wandb_project",
    }
    assert facts.keys() >= {"code", "torch", "Python"}
    other = replace(config, optim=replace(config.optim, learning_rate=0.5))
    assert {k for k, v in start_facts(other).items() if facts[k] != v} == {"--learning-rate"}


def test_another_version_of_the_code_is_detected(tmp_path, monkeypatch):
    for path in ("gpt/a.py", "kernels/b.py", "train.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("x = 1\n")
    monkeypatch.setattr(ranks, "ROOT", tmp_path)
    seen = []
    for path in (None, "gpt/a.py", "kernels/b.py", "train.py"):
        if path:
            (tmp_path / path).write_text("x = 2\n")
        ranks._code_digest.cache_clear()
        seen.append(start_facts(Config())["code"])
    ranks._code_digest.cache_clear()
    assert len(set(seen)) == 4


def test_another_text_tokenizer_or_checkpoint_is_detected(tmp_path, make):
    for name, text in (("a", TEXT), ("b", TEXT.replace("hill", "lane")), ("c", TEXT + "?")):
        (tmp_path / f"{name}.txt").write_text(text)
    checkpoint = tmp_path / "step_00000001"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text("{}")
    one, two, three = (data_facts(make(tmp_path / f"{name}.txt"), checkpoint) for name in "abc")
    assert {name for name in one if one[name] != two[name]} == {"corpus"}
    assert {name for name in one if one[name] != three[name]} == {"corpus", "tokenizer"}
    (checkpoint / "manifest.json").write_text("{ }")
    moved = data_facts(make(tmp_path / "a.txt"), checkpoint)
    assert {name for name in one if one[name] != moved[name]} == {"checkpoint"}
    assert data_facts(make(tmp_path / "a.txt"), None)["checkpoint"] == "none"


def test_one_bit_of_a_weight_is_detected():
    model = GPT(replace(load_config(other_flags()).model, vocab_size=11))
    before = weight_facts(model)
    assert weight_facts(model) == before
    with torch.no_grad():
        model.head.weight.view(torch.int32)[0, 0] ^= 1
    assert weight_facts(model) != before


# Two processes.

RANKS_DIFFER = {
    "corpus": (
        '--corpus", "text.txt"',
        '--corpus", "other.txt"',
        r"rank 1 has corpus \w{12} \(.*\) where rank 0 has \w{12}",
    ),
    "vocabulary": (
        '--corpus", "text.txt"',
        '--corpus", "more.txt"',
        r"tokenizer \w{12} \(vocabulary 27\) where rank 0 has",
    ),
    "option": ('--batch-size", "4"', '--batch-size", "2"', r"rank 1 has --batch-size 2 where rank 0 has 4:"),
    "code": ("", "", r"rank 1 has code \w{12} where rank 0 has \w{12}:"),
}


def test_two_different_ranks_both_report_it(tmp_path):
    """Starts one job per kind, all at once; rank 1 has another command and its own cache."""
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "other.txt").write_text(TEXT.replace("up the hill", "to the mill"))
    (tmp_path / "more.txt").write_text(TEXT + "?")
    started = []
    for kind, (ours, theirs, message) in RANKS_DIFFER.items():
        words = repr(flags(f"run-{kind}", 4)).replace("'", '"')
        rank_1 = words.replace(ours, theirs) if ours else words
        assert (rank_1 != words) == bool(ours)
        (tmp_path / f"{kind}.py").write_text(
            f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nrank = int(os.environ['RANK'])\n"
            "import gpt.training.ranks, train\n"
            "from gpt.errors import run_command\nfrom gpt.training.command import load_config\n"
            f"if rank and {not ours}: gpt.training.ranks._code_digest = lambda: '0' * 12\n"
            f"words = [{words}, {rank_1}][rank] + ['--cache-dir', f'{kind}-cache{{rank}}']\n"
            "run_command(lambda: train.main(load_config(words)))\n"
        )
        process = subprocess.Popen(
            [*LAUNCH, f"{kind}.py"],
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append((kind, message, process))
    for kind, message, process in started:
        _, errors = process.communicate(timeout=100)
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert len(lines) == 2 and lines[0] == lines[1], errors
        assert re.search(message, lines[0]), lines[0]
        assert errors.count("exitcode  : 2") == 2 and "/train.py" not in errors, errors
        assert not Path(tmp_path, f"run-{kind}").exists()


def test_ranks_that_wait_for_rank_0_can_be_stopped(monkeypatch):
    """They look again and again, and wait within the library only when there is nothing left to wait for."""
    looks = iter([False, False, True])
    calls = []

    class Barrier:
        def is_completed(self) -> bool:
            calls.append("look")
            return next(looks)

        def wait(self) -> None:
            calls.append("wait")

    group = SimpleNamespace(
        new_group=lambda **options: "patient",
        barrier=lambda group, async_op=False: Barrier(),
        destroy_process_group=calls.append,
    )
    monkeypatch.setattr(distributed, "dist", group)
    monkeypatch.setattr(distributed.time, "sleep", lambda seconds: None)
    with World(torch.device("cpu"), 1, 2).main_first():
        calls.append("block")
    assert calls == ["look", "look", "look", "wait", "block", "patient"]


@pytest.mark.parametrize(("parallel", "joined"), [("auto", False), ("ddp", True)])
def test_a_single_rank_joins_a_group_only_if_asked(parallel, joined, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    started = []
    group = SimpleNamespace(
        init_process_group=lambda backend, **options: started.append(backend),
        destroy_process_group=lambda: started.append("end"),
        DistError=RuntimeError,
    )
    monkeypatch.setattr(distributed, "dist", group)
    with distributed.join("cpu", parallel) as world:
        assert (world.rank, world.size, world.joined) == (0, 1, joined)
    assert started == (["gloo", "end"] if joined else [])
