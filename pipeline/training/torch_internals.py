"""Everything in training that relies on torch's internals, with the gain; to be checked when torch is upgraded.

Written for torch 2.15. tests/pipeline/test_optimizers.py, test_average.py and test_distributed.py hold what is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def fused_optimizer(
    kind: Callable[..., Optimizer], parameters: Iterable[Tensor] | list[dict[str, Any]], **settings: Any
) -> Optimizer:
    """An optimiser of torch that updates all parameters by one fused kernel (AdaGrad, which has one for CPUs alone: by
    one kernel for each operation elsewhere); see `plain_optimizer`."""
    groups = [group if isinstance(group, dict) else {"params": [group]} for group in parameters]
    on_cpu = all(parameter.device.type == "cpu" for group in groups for parameter in group["params"])
    return plain_optimizer(kind, groups, fused=on_cpu or kind is not torch.optim.Adagrad, **settings)


def plain_optimizer(
    kind: Callable[..., Optimizer], parameters: Iterable[Tensor] | list[dict[str, Any]], **settings: Any
) -> Optimizer:
    """An optimiser, without importing torch's compiler.

    torch marks some methods of Optimizer as not to be compiled; the first call of one of them imports torch._dynamo for
    it, which takes 2 s and 160 MB. The attribute `__dynamo_disable`, where torch._disable_dynamo caches the result,
    makes it unnecessary.
    """
    for method in (Optimizer.add_param_group, Optimizer.state_dict, Optimizer.load_state_dict):
        plain = inspect.unwrap(method)
        setattr(plain, "__dynamo_disable", plain)
    return kind(parameters, **settings)


def update_weights(optimizer: Optimizer) -> None:
    """One step of an optimiser from `plain_optimizer`, without the hooks, profiling and compiler checks that torch
    wraps around `step`; the last of these would import torch._dynamo."""
    with torch.no_grad():
        inspect.unwrap(type(optimizer).step)(optimizer)


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict`, which would also take over how the optimiser of another device computed."""
    fused = [group["fused"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, is_fused in zip(optimizer.param_groups, fused, strict=True):
        group["fused"] = is_fused


def begin_velocities(optimizer: Optimizer) -> None:
    """Give every parameter of SGD with momentum a velocity, 0 where it has none yet: the fused kernel refuses a group
    in which some parameters have been updated before and others have not."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("momentum") else ():
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def blend_all(averages: list[Tensor], values: list[Tensor], weight: float) -> None:
    """average += weight * (value - average) for all pairs, in place, by one call for all tensors; torch has no public
    function for that."""
    torch._foreach_lerp_(averages, values, weight)


def seed_generator(device: torch.device, seed: int) -> None:
    """`torch.manual_seed` for one device alone: that one takes 1.5 ms, and memory, because it remembers the call for
    every device that is not in use yet."""
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    generator.manual_seed(seed)


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16: on a CPU AVX512-BF16 or AMX, without which convolutions in
    bfloat16 are slower than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
