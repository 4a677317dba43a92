"""The device to compute on (--device), its free memory, and copying tensors to it."""

from __future__ import annotations

import re
from typing import Literal

import psutil
import torch
from torch import Tensor

from convline.errors import ConvlineError
from pipeline.training.torch_internals import computes_in_bfloat16


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that --device names, for the process `local_rank` on this machine: "auto" is CUDA where it works.

    Raises ConvlineError for a device that does not exist here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConvlineError(f"--device {name} is unknown; use auto, cpu, cuda or cuda:N")
    device = torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConvlineError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = False  # TF32 keeps 10 bits of mantissa, fewer than the parity check needs
    return device


def native_precision(device: torch.device) -> Literal["float32", "bfloat16"]:
    """The faster of both in which the device computes convolutions by instructions of its own."""
    return "bfloat16" if computes_in_bfloat16(device) else "float32"


def free_memory(device: torch.device) -> int:
    """The free memory of the device, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def copy_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, copied from pinned memory, so that the copy runs while the device computes."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
