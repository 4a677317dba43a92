"""Several devices, on one machine or many: the ranks of one training, each with its share of every batch.

torchrun starts them, or `--devices` (`launch.py`), and says by the environment who is who.
"""

from __future__ import annotations

import atexit
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from convline import console
from convline.errors import ConvlineError
from pipeline.training.torchrun import is_rank, meeting_file, restarts

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)  # for a rank that is silent; one that dies is noticed at once
AGREE_EVERY = 10  # steps between two looks at whether a rank on CUDA was asked to stop


@dataclass(frozen=True)
class World:
    """This process among those of its training: `rank` of `size`, `local_size` of them on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone logs and saves."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """The part of a batch of `count` images that is this rank's."""
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def check_batch_size(self, batch_size: int) -> None:
        """Raises ConvlineError where a batch has no even shares."""
        if batch_size % self.size:
            raise ConvlineError(
                f"train.batch_size {batch_size} cannot be shared evenly by {self.size} ranks; choose a multiple of it"
            )

    def distributed(self, network: nn.Module, device: torch.device) -> nn.Module:
        """The network, its gradients averaged over the ranks, its dropout masks cut from the whole batch's."""
        if self.size == 1:
            return network
        for name, layer in list(network.named_modules()):
            if type(layer) is nn.Dropout:
                network.set_submodule(name, SharedDropout(layer.p, self))
        devices = [device] if device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=devices, gradient_as_bucket_view=True)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, values: Sequence[Tensor]) -> list[float]:
        """The mean over the ranks of each of some numbers."""
        return (self.sum(torch.stack([value.detach().double() for value in values])) / self.size).tolist()

    def any(self, flag: Tensor) -> Tensor:
        """Whether any rank's `flag` (a boolean scalar) is true, without waiting for the device."""
        if self.size == 1:
            return flag
        flags = flag.to(torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return flags > 0

    def agreed_stop(self, step: int, device: torch.device, status: int | None) -> int | None:
        """The exit status with which all ranks stop after `step`, if any of them was asked to."""
        if self.size == 1 or (device.type == "cuda" and step % AGREE_EVERY):
            return status if self.size == 1 else None
        asked = torch.tensor(status or 0)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return int(asked) or None

    def broadcast(self, value: T) -> T:
        """Rank 0's `value`, on every rank: what a checkpoint may hold.

        It is read as a checkpoint is, which runs no code: whoever reaches a rank over the network can't bring any.
        """
        if self.size == 1:
            return value
        packed = io.BytesIO()
        if self.is_main:
            torch.save(value, packed)
        size = torch.tensor(packed.tell())
        dist.broadcast(size, 0)
        content = torch.empty(int(size), dtype=torch.uint8)
        if self.is_main:
            content.copy_(torch.frombuffer(packed.getbuffer(), dtype=torch.uint8))
        dist.broadcast(content, 0)
        return value if self.is_main else torch.load(io.BytesIO(content.numpy().tobytes()), weights_only=True)

    def on_main(self, action: Callable[[], T]) -> T:
        """What `action` returns on rank 0, on every rank (see `broadcast`); where it raises, every rank ends."""
        result, error = None, None
        if self.is_main:
            try:
                result = action()
            except Exception as problem:
                error = problem
        if self.broadcast(error is not None):
            if error is not None:
                raise error
            sys.exit(1)  # rank 0 says why
        return self.broadcast(result)  # type: ignore[return-value]


class SharedDropout(nn.Dropout):
    """Dropout by this rank's part of the mask that one process would draw for the whole batch."""

    def __init__(self, p: float, world: World) -> None:
        super().__init__(p)
        self._world = world

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        whole = len(x) * self._world.size
        mask = F.dropout(x.new_ones((whole, *x.shape[1:])), self.p)
        return x * mask[self._world.share(whole)]


@contextmanager
def join(device: str) -> Iterator[World]:
    """Meet the other ranks that torchrun or `--devices` has started; a world of one where none has."""
    if not is_rank():
        yield World()
        return
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    world = World(*(int(os.environ[name]) for name in names))
    console.mute(not world.is_main)
    on_cuda = device != "cpu" and torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    dist.init_process_group(backend, store=_store(world), rank=world.rank, world_size=world.size, timeout=PATIENCE)
    try:
        yield world
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise ConvlineError("another rank of this training ended; --resume goes on from its checkpoint") from error
        raise
    finally:
        dist.destroy_process_group()


def _store(world: World) -> Store:
    """Where the ranks find each other."""
    if (meeting := meeting_file()) is not None:
        _end_with_launcher()
        store: Store = FileStore(meeting, world.size)
        store.set_timeout(PATIENCE)
        return store
    store, _, _ = next(rendezvous("env://", timeout=PATIENCE))
    # torchrun keeps its store when it starts ranks again: what they tell each other must not be what the dead told
    return PrefixStore(f"attempt {restarts()}", store)


def _end_with_launcher() -> None:
    """Save and end, as by SIGTERM, where `--devices` is killed: its end of standard input is closed then."""

    def wait() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def rank_process() -> Iterator[None]:
    """End this rank at the end of the block, without taking Python down.

    DistributedDataParallel keeps gloo's threads past `destroy_process_group`, and one that lets go of a tensor while
    Python is taken down aborts the process (pytorch/pytorch#179291).
    """
    status = 0
    try:
        yield
    except SystemExit as end:
        status = int(end.code or 0)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
