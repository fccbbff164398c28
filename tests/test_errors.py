"""Exit statuses and messages of commands."""

import numpy as np
import pytest
import torch

from gpt import errors
from gpt.errors import UserError, out_of_memory, run_command


def ended(capsys, main) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        run_command(main)
    return stop.value.code, capsys.readouterr().err


def test_exit_statuses_are_those_of_the_documentation():
    names = ("EXIT_DONE", "EXIT_FAULT", "EXIT_USER", "EXIT_DIVERGED", "EXIT_STOPPED")
    assert [getattr(errors, name) for name in names] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "allocate",
    [lambda: torch.empty(1 << 50), lambda: np.empty(1 << 50), lambda: [0] * (1 << 50)],
    ids=["torch", "numpy", "python"],
)
def test_out_of_memory_is_one_sentence(capsys, allocate):
    status, errors = ended(capsys, lambda: allocate() and 0)
    assert status == 2
    assert errors == "error: out of memory: lower --batch-size, --seq-len or the model's size\n"


class OutOfMemoryError(Exception):
    """Has the name of torch.cuda.OutOfMemoryError."""


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (OutOfMemoryError("CUDA"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("a bug"), False),
        (OSError(28, "No space left on device"), False),
    ],
    ids=repr,
)
def test_errors_that_mean_out_of_memory(error, is_one):
    assert out_of_memory(error) is is_one


def test_a_message_with_line_breaks_is_one_line(capsys):
    def main():
        raise UserError("no file 'a\nb'")

    assert ended(capsys, main) == (2, "error: no file 'a b'\n")


def test_a_refused_path_is_one_sentence(capsys, tmp_path):
    name = tmp_path / ("x" * 5000)
    assert ended(capsys, lambda: name.is_dir()) == (2, f"error: cannot use {name}: File name too long\n")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError(5, "Input/output error")], ids=["runtime", "os"])
def test_a_bug_keeps_its_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        run_command(main)
