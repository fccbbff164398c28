"""A few fixed random calls of attention; a failure is found and can be repeated."""

import pytest

from kernels import attention_chunked
from tests import fuzz_attention


@pytest.mark.parametrize("number", range(18))
def test_random_calls_equal_the_reference(number, device):
    assert fuzz_attention.run_case(20260, number, device) is None


def test_a_failure_is_printed_as_a_line_that_repeats_it(monkeypatch, capsys):
    real = attention_chunked.chunked_forward
    assert fuzz_attention.main(["--cases", "1", "--seed", "3", "--only", "2"]) == 0
    monkeypatch.setattr(fuzz_attention, "check", lambda *args, impl="triton", **options: 1 / (impl == "triton"))
    assert fuzz_attention.main(["--cases", "3", "--seed", "3"]) == 1
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("python -m tests.fuzz_attention --seed 3 --only 2  # ZeroDivisionError")
    assert fuzz_attention.main(line.split("#")[0].split()[3:]) == 1
    assert attention_chunked.chunked_forward is real
