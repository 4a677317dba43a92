"""Training on several devices or machines: the ranks, each with its share of every batch.

torchrun starts the ranks, or `--devices` (launch.py) does; environment variables give each its number.
"""

from __future__ import annotations

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
from torch.distributed import FileStore, PrefixStore, Store  # type: ignore[attr-defined]  # public, without types
from torch.distributed.rendezvous import rendezvous
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from convline import console
from convline.errors import ConvlineError
from pipeline.training.rank_environment import is_rank, meeting_file, restart_count
from pipeline.training.shared_batch_norm import share_batch_statistics

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)  # for a rank that is silent; one that dies is noticed at once
AGREE_EVERY = 10  # steps between two checks, on CUDA, whether a rank was asked to stop


@dataclass(frozen=True)
class RankGroup:
    """The processes ("ranks") of one training, seen from this one: it is `rank` of `size`; on this machine it is
    `local_rank` of `local_size`."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that logs and saves."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This rank's part of a batch of `count` images."""
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def check_batch_size(self, batch_size: int) -> None:
        """Raises ConvlineError where a batch cannot be shared evenly."""
        if batch_size % self.size:
            raise ConvlineError(
                f"train.batch_size {batch_size} cannot be shared evenly by {self.size} ranks; choose a multiple of "
                f"{self.size}"
            )

    def distributed(self, network: nn.Module, device: torch.device) -> nn.Module:
        """The network with gradients that are averaged over the ranks, with each rank's part of the dropout masks that
        one process would draw for the whole batch, and with BatchNorm over the whole batch."""
        if self.size == 1:
            return network
        devices = [device] if device.type == "cuda" else None
        shared = share_batch_statistics(self.with_shared_dropout(network), self.size, device)
        return DistributedDataParallel(shared, device_ids=devices, gradient_as_bucket_view=True)

    def with_shared_dropout(self, network: nn.Module) -> nn.Module:
        """The same network, in which each rank draws its part of the dropout masks for the whole batch."""
        for name, layer in list(network.named_modules()) if self.size > 1 else ():
            if type(layer) is nn.Dropout:
                shared = SharedDropout(layer.p, self)
                network.set_submodule(name, shared.train(layer.training))
        return network

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace each gradient by its mean over the ranks."""
        for parameter in parameters if self.size > 1 else ():
            if parameter.grad is not None:
                self.sum(parameter.grad).div_(self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, values: Sequence[Tensor]) -> list[float]:
        """The mean over the ranks of each of the scalars `values`."""
        return (self.sum(torch.stack([value.detach().double() for value in values])) / self.size).tolist()

    def any(self, flag: Tensor) -> Tensor:
        """Whether `flag`, a boolean scalar, is true on any rank; does not wait for the device."""
        if self.size == 1:
            return flag
        flags = flag.to(torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return flags > 0

    def agreed_stop(self, step: int, device: torch.device, status: int | None) -> int | None:
        """The exit status with which all ranks stop after `step`, if any of them was asked to stop with `status`."""
        if self.size == 1 or (device.type == "cuda" and step % AGREE_EVERY):
            return status if self.size == 1 else None
        requested = torch.tensor(status or 0)
        dist.all_reduce(requested, dist.ReduceOp.MAX)
        return int(requested) or None

    def broadcast(self, value: T) -> T:
        """Rank 0's `value`, on every rank; it may hold what a checkpoint may hold.

        It is loaded as a checkpoint is, without running code that it might contain, so that nobody who reaches a rank
        over the network can run code there.
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
        """Run `action` on rank 0 and return its result on every rank (see `broadcast`). Where it raises, all ranks
        end."""
        result, error = None, None
        if self.is_main:
            try:
                result = action()
            except Exception as raised:
                error = raised
        if self.broadcast(error is not None):
            if error is not None:
                raise error
            sys.exit(1)  # rank 0 prints the error
        return self.broadcast(result)  # type: ignore[return-value]

    def main_first(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0, then on the others; each gets its own result. Where it raises on rank 0, all ranks
        end."""
        results: list[T] = []
        self.on_main(lambda: results.append(action()))
        return results[0] if self.is_main else action()


class SharedDropout(nn.Dropout):
    """Dropout with this rank's part of the mask that one process would draw for the whole batch."""

    def __init__(self, p: float, ranks: RankGroup) -> None:
        super().__init__(p)
        self._ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        batch_size = len(x) * self._ranks.size
        mask = F.dropout(x.new_ones((batch_size, *x.shape[1:])), self.p)
        return x * mask[self._ranks.share(batch_size)]


@contextmanager
def join(device: str) -> Iterator[RankGroup]:
    """Connect to the other ranks that torchrun or `--devices` has started; a group of one where neither has."""
    if not is_rank():
        yield RankGroup()
        return
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    ranks = RankGroup(*(int(os.environ[name]) for name in names))
    console.mute(not ranks.is_main)
    on_cuda = device != "cpu" and torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    dist.init_process_group(backend, store=_store(ranks), rank=ranks.rank, world_size=ranks.size, timeout=TIMEOUT)
    try:
        yield ranks
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise ConvlineError("another rank of this training ended; --resume goes on from its checkpoint") from error
        raise
    finally:
        dist.destroy_process_group()


def _store(ranks: RankGroup) -> Store:
    """The key-value store by which the ranks find each other."""
    if (meeting := meeting_file()) is not None:
        _end_with_launcher()
        store: Store = FileStore(meeting, ranks.size)
        store.set_timeout(TIMEOUT)
        return store
    store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
    # torchrun keeps its store when it restarts ranks: without the prefix they would read what the dead ranks wrote
    return PrefixStore(f"attempt {restart_count()}", store)


def _end_with_launcher() -> None:
    """Save and end, as on SIGTERM, when the process of `--devices` dies: this closes its end of our standard input."""

    def wait() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
