"""A CUDA device of torch's fake tensors, for machines without a GPU.

They run no kernel, but raise where a value is needed on the host, and where two devices meet in one operation. What
only a GPU can show stays untested here: the backward engine, autocast, the random numbers of dropout, CUDA graphs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.training.layer_summary import _sample_positions

DEVICE = torch.device("cuda", 0)
MEMORY = 2**33


class DeviceAlone(TorchDispatchMode):
    """In the block, whatever makes the host wait for the device raises: what fake tensors refuse, and copies to the
    device from memory that is not pinned."""

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._fused_sgd_.default:  # fake tensors do not know it
            tensors = [tensor for argument in args if isinstance(argument, list) for tensor in argument]
            assert {tensor.device for tensor in tensors} == {DEVICE}
            return None
        if function is torch.ops.aten._to_copy.default:
            returns_at_once = kwargs.get("non_blocking", False) and hasattr(args[0], "is_pinned_memory")
            refuse_waiting_copy(args[0].device, kwargs.get("device", args[0].device), returns_at_once)
        if function is torch.ops.aten.copy_.default:
            refuse_waiting_copy(args[1].device, args[0].device, args[2:] == (True,))
        if function in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
            for index in args[1]:
                refuse_waiting_copy(args[0].device if index is None else index.device, args[0].device, False)
        return function(*args, **kwargs)


def refuse_waiting_copy(source: torch.device, target: torch.device, returns_at_once: bool) -> None:
    if source != target and not returns_at_once:
        raise AssertionError(f"a copy from {source} to {target} waits for the device")


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the block, tensors of `DEVICE` are fake, and pinned memory is ordinary memory."""

    def to(network: nn.Module, device: torch.device) -> nn.Module:
        """`nn.Module.to` cannot replace a tensor by a fake one."""
        for layer in network.modules():
            for name, weight in layer.named_parameters(recurse=False):
                layer._parameters[name] = nn.Parameter(mode.from_tensor(weight.detach()).to(device))
            for name, buffer in layer.named_buffers(recurse=False):
                layer._buffers[name] = mode.from_tensor(buffer).to(device)
        return network

    def pin_memory(tensor: Tensor) -> Tensor:
        setattr(tensor, "is_pinned_memory", True)  # noqa: B010
        return tensor

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with monkeypatch.context() as patched, warnings.catch_warnings(), mode:
        # copy.deepcopy asks whether there is data to copy
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        patched.setattr(torch.cuda, "mem_get_info", lambda _: (MEMORY, MEMORY))
        patched.setattr(torch.cuda, "default_generators", (torch.Generator(),))
        patched.setattr(nn.Module, "to", to)
        patched.setattr(Tensor, "pin_memory", pin_memory)
        try:
            _sample_positions.cache_clear()
            yield
        finally:
            _sample_positions.cache_clear()  # it may hold fake tensors


@contextmanager
def zero_gradients(monkeypatch: pytest.MonkeyPatch, parameters: list[nn.Parameter]) -> Iterator[None]:
    """In the block, the backward pass only gives the parameters that learn a gradient of 0."""

    def backward(loss: Tensor) -> None:
        assert (loss.device, loss.shape, loss.requires_grad) == (DEVICE, (), True)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "backward", backward)
        yield


@contextmanager
def values_may_be_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the block, which may wait for the device, values on the host are 0, and tensors of one shape are equal."""

    def zeros(tensor: Tensor) -> np.ndarray:
        assert tensor.device.type == "cpu", "copy the tensor to the host first"
        return np.zeros(tensor.shape, str(tensor.dtype).removeprefix("torch."))

    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "numpy", zeros)
        patched.setattr(FakeTensor, "tolist", lambda tensor: np.zeros(tensor.shape).tolist())
        patched.setattr(torch, "equal", lambda one, other: (one.device, one.shape) == (other.device, other.shape))
        yield
