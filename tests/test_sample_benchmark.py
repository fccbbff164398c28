"""The sampling benchmark: contenders do the same work, and the figures are computed correctly."""

import json

import pytest
import torch

from benchmarks import sample
from gpt.model import GPT

TINY = sample.Setting("tiny", n_layer=1, n_head=2, n_embd=16, vocab_size=11, rows=2, prompt=4, new=6)


def test_steps_are_greedy_decoding(monkeypatch):
    """There are as many steps as tokens, and each gets the likeliest token of the last."""
    torch.manual_seed(0)
    model = GPT(TINY.config()).eval()
    prompts = torch.randint(11, (2, 4))
    fed = []
    step = sample.Decoder.step
    monkeypatch.setattr(sample.Decoder, "step", lambda self, tokens: fed.append(tokens) or step(self, tokens))
    run = sample.ours(model, TINY, prompts)
    assert len(run(6)) == len(run(6)) == 6
    text = torch.cat([prompts, *fed[:5]], dim=1)
    assert torch.equal(torch.cat(fed[:5]), torch.cat(fed[5:]))
    with torch.no_grad():
        assert torch.equal(model(text)[:, 3:-1].argmax(-1), text[:, 4:])


def test_ratios_are_medians_of_pairs_and_speeds_count_every_row(monkeypatch, tmp_path, capsys):
    runs = {
        sample.FP32: lambda new: [0.5, 0.25, 0.25],
        sample.BF16: lambda new: [0.25, 0.125, 0.125],
        sample.INT8: lambda new: [1.0],
        sample.UNCACHED: lambda new: [8.0],
    }
    monkeypatch.setattr(sample, "prepare", lambda *args: (runs, {sample.HF: "not installed"}))
    row = sample.measure(TINY, 3, "cpu", 1)
    assert row.tokens_per_second == pytest.approx({"fp32": 12, "bf16": 24, "int8": 12, "uncached": 1.5})
    assert row.ratios == {"fp32 / uncached": 8, "bf16 / uncached": 16, "int8 / uncached": 8}
    assert row.early_and_late_ms == (250, 250)
    matrices = sum(
        w.numel() for name, w in GPT(TINY.config()).named_parameters() if w.ndim == 2 and "position" not in name
    )
    assert row.weights_gb_per_second["fp32"] == pytest.approx(4 * matrices / (1 / 6) / 1e9)
    assert row.weights_gb_per_second["int8"] == pytest.approx(matrices / (1 / 6) / 1e9)
    assert [s.name for s in sample.settings(False, False, "cuda")][-1] == "GPT 1B"
    assert sample.main(["--quick", "--rounds", "1", "--json", str(tmp_path / "out.json")]) == 0
    out = capsys.readouterr().out
    assert "not installed" in out and "load" in out
    record = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert [r["setting"]["rows"] for r in record["rows"]] == [1, 8]
