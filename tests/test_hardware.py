"""The table of peaks, against a second list from the makers' data sheets."""

import pytest
import torch

from gpt.training.hardware import PEAK_TFLOPS, mfu, peak_flops, peak_of

# Dense bfloat16 in TFLOP/s, by the names that drivers report.
SHEETS = {
    "NVIDIA B200": 2250, "NVIDIA B100": 1750, "NVIDIA GB200": 2500, "NVIDIA GH200 480GB": 989.4,
    "NVIDIA H200 NVL": 835.5, "NVIDIA H200": 989.4, "NVIDIA H100 PCIe": 756, "NVIDIA H100 NVL": 835.5,
    "NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H20": 148, "NVIDIA H800": 989.4, "NVIDIA A800-SXM4-80GB": 312,
    "NVIDIA A100-SXM4-40GB": 312, "NVIDIA A40": 149.7, "NVIDIA A30": 165, "NVIDIA A10G": 70, "NVIDIA A10": 125,
    "NVIDIA L40S": 362, "NVIDIA L40": 181, "NVIDIA L4": 121, "NVIDIA RTX 6000 Ada Generation": 364.2,
    "NVIDIA RTX A6000": 154.8, "NVIDIA RTX A5000": 111.1, "NVIDIA GeForce RTX 5090": 209.5,
    "NVIDIA GeForce RTX 5080": 112.6, "NVIDIA GeForce RTX 4090": 165.2, "NVIDIA GeForce RTX 4080": 97.5,
    "NVIDIA GeForce RTX 3090": 71, "AMD Instinct MI355X": 2516.6, "AMD Instinct MI325X": 1307.4,
    "AMD Instinct MI300X": 1307.4, "AMD_Instinct_MI250X": 383,
}  # fmt: skip


@pytest.mark.parametrize("name", SHEETS)
def test_the_peak_of_a_device(name):
    assert peak_of(name) == pytest.approx(SHEETS[name] * 1e12, rel=1e-12)


def test_every_entry_is_in_the_second_list():
    assert len(SHEETS) == len(PEAK_TFLOPS)


def test_only_whole_words_of_a_device_name_match():
    """An A100X or an H1000 is unknown."""
    assert [peak_of(name) for name in ("NVIDIA A100X", "NVIDIA H1000", "RTX", "")] == [None] * 4


def test_the_peak_is_looked_up_by_the_gpus_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA H100 PCIe {device.index}")
    assert peak_flops(torch.device("cuda", 1)) == 756e12
    assert peak_flops(torch.device("cpu")) is None


def test_mfu_is_of_one_device_by_default():
    assert mfu(3.0, 5.0, 60.0) == 0.25
    assert mfu(3.0, 5.0, 15.0, devices=4) == 0.25


def test_the_longest_entry_of_the_table_wins(monkeypatch):
    monkeypatch.setattr("gpt.training.hardware.PEAK_TFLOPS", {"Z1": 1.0, "A Z1": 2.0})
    assert peak_of("NVIDIA Z1") == 1e12
    assert peak_of("NVIDIA Z1 A") == 2e12
