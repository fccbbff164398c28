"""Peak FLOP/s of devices, and model FLOPs utilisation.

MFU, model FLOPs utilisation (Chowdhery et al. 2022, PaLM, appendix B):
    tokens per second x FLOPs per token (GPT.flops_per_token, forward and backward, causal) / (devices x peak)
Recomputed work, as under activation checkpointing, does not count.
"""

import torch

# Dense bfloat16 matrix products with float32 accumulation, in TFLOP/s, from the makers' data sheets. Some sheets print
# twice the figure, for sparse matrices.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "B100": 1750.0,
    "GB200": 2500.0,
    "GH200": 989.4,
    "H200 NVL": 835.5,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "H20": 148.0,
    "H800": 989.4,
    "A800": 312.0,
    "A100": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 6000 Ada": 364.2,
    "RTX A6000": 154.8,
    "RTX A5000": 111.1,
    "RTX 5090": 209.5,
    "RTX 5080": 112.6,
    "RTX 4090": 165.2,
    "RTX 4080": 97.5,
    "RTX 3090": 71.0,
    "MI355X": 2516.6,
    "MI325X": 1307.4,
    "MI300X": 1307.4,
    "MI250X": 383.0,
}


def peak_flops(device: torch.device) -> float | None:
    """Return the peak FLOP/s of dense bfloat16 matrix products on this device; None if it is not in the table."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_of(name: str) -> float | None:
    """Look up a name such as "NVIDIA H100 80GB HBM3": the longest entry whose words are all in it."""
    words = name.replace("-", " ").replace("_", " ").split()
    known = [key for key in PEAK_TFLOPS if all(word in words for word in key.split())]
    return PEAK_TFLOPS[max(known, key=len)] * 1e12 if known else None


def mfu(tokens_per_second: float, flops_per_token: float, peak: float | None, devices: int = 1) -> float | None:
    """Compute model FLOPs utilisation, 0 to 1; None if the peak is unknown."""
    return None if peak is None else tokens_per_second * flops_per_token / (devices * peak)
