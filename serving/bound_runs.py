"""The model on a GPU: a batch is copied there while an earlier one is computed, by onnxruntime's IO binding."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from convline.errors import ModelError

SLOTS = 2  # one for the batch that is computed, one for the batch that is copied meanwhile
SAME = 1e-3  # of the largest value: another order of sums may give other last digits on a GPU

T = TypeVar("T")
Outputs = list[NDArray[np.float32]]


class BoundRuns:
    """Runs of a session on batches of one `shape`, uint8 [batch, height, width, channels], in order, on a thread.

    Binding saves no copy: pixels begin on the host and scores end there. It separates the copy from the run. So a
    shared buffer is free as soon as it is copied, and the device computes while this process copies the next batch and
    makes records of the last one. Memory for `SLOTS` batches on the device is allocated once.

    These calls have run with the CPU as their device alone; on a GPU they have not been tried yet.
    """

    def __init__(self, session: onnxruntime.InferenceSession, outputs: Sequence[str], shape: tuple[int, ...]) -> None:
        self._session = session
        self._free: SimpleQueue[_Slot] = SimpleQueue()
        for _ in range(SLOTS):
            self._free.put(_Slot(session, outputs, shape))
        self._thread = ThreadPoolExecutor(1)

    def start(self, images: NDArray[np.uint8]) -> Future[Outputs]:
        """Copy a batch to the device and run the model on it. `images` may be overwritten when this returns, which is
        when one of the last two batches is done."""
        slot = self._free.get()
        slot.load(images)
        return self._thread.submit(self._run, slot)

    def _run(self, slot: _Slot) -> Outputs:
        try:
            return slot.run()
        finally:
            self._free.put(slot)

    def check(self, images: NDArray[np.uint8], expected: Outputs) -> None:
        """Raises ModelError unless the outputs for a batch are those `expected`, in each slot, also when it is used
        again: a binding may keep the values of its first batch. Starts no thread, so that processes can be forked."""
        for batch, wanted in ((images[::-1], [values[::-1] for values in expected]), (images, expected)):
            for _ in range(SLOTS):
                slot = self._free.get()
                slot.load(batch)
                if not all(map(_agree, self._run(slot), wanted)):
                    raise ModelError("the model gives other results with IO binding on this device; use --provider cpu")

    def __enter__(self) -> BoundRuns:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)


def one_behind(items: Iterable[T]) -> Iterator[T]:
    """Each item, once the next one was taken: it is started before the results of this one are waited for."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def _agree(found: NDArray[np.float32], expected: NDArray[np.float32]) -> bool:
    largest = float(np.abs(expected[np.isfinite(expected)]).max(initial=1))
    return bool(np.allclose(found, expected, rtol=0, atol=SAME * largest, equal_nan=True))


class _Slot:
    """Memory for one batch on the session's device, and for its outputs on the host."""

    def __init__(self, session: onnxruntime.InferenceSession, outputs: Sequence[str], shape: tuple[int, ...]) -> None:
        device = "cpu" if session.get_providers()[0] == "CPUExecutionProvider" else "cuda"
        self._session = session
        self._shape = shape
        self._images = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.uint8, device)
        self._binding = session.io_binding()
        for name in outputs:
            self._binding.bind_output(name)  # on the host; allocated by the first run, then reused

    def load(self, images: NDArray[np.uint8]) -> None:
        """Copy a batch to the device."""
        assert images.shape == self._shape and images.dtype == np.uint8
        self._images.update_inplace(images)
        # each time: where the graph takes its input on the CPU, onnxruntime copies it when it is bound, and only then
        self._binding.bind_ortvalue_input("image", self._images)

    def run(self) -> Outputs:
        """The outputs for the loaded batch, as arrays of their own."""
        self._session.run_with_iobinding(self._binding)
        return list(self._binding.copy_outputs_to_cpu())
