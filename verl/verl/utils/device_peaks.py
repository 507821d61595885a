"""What a GPU could compute at most, by its name."""

from __future__ import annotations

import re

import torch

HALF_TFLOPS = {
    "B200": 2250.0,
    "GB200": 2500.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L20": 119.5,
    "L4": 121.0,
    "A40": 150.0,
    "A30": 165.0,
    "A10": 125.0,
    "RTX A6000": 155.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}
"""Dense bfloat16 and float16 products, summed in float32, in 10^12 operations per second by the words of torch's name
that tell a GPU, the first that fit; from the data sheets."""

# Parts of a GPU, and ones that share a larger one's name.
_ANOTHER = re.compile(r"\b(MIG|Laptop|D|Ti|Max-Q)\b")


def peak_tflops(device_name: str | None, dtype: torch.dtype) -> float | None:
    """10^12 operations per second of matrix products on a GPU of torch's name; None where that is not known.

    Of float32 nothing is said: it depends on the precision that products may have.
    """
    if device_name is None or dtype not in (torch.bfloat16, torch.float16) or _ANOTHER.search(device_name):
        return None
    return next((peak for words, peak in HALF_TFLOPS.items() if re.search(rf"\b{words}\b", device_name)), None)
