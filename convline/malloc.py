"""Settings of the C library's memory allocator (malloc) for training, for inference by PyTorch and for decoding."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
# bytes of the tensors whose memory is kept: more than those of networks for photographs; what an older glibc accepts
KEPT, KEPT_BY_OLDER = 2**30, 32 * 2**20
# bytes that a process which decodes keeps: the pixels of a photograph of 60 megapixels
KEPT_FOR_DECODING = 256 * 2**20


def keep_freed_memory(at_most: int = 2**31 - 1) -> None:
    """Have malloc keep freed memory, `at_most` so many bytes beyond the last block in use. By default it returns the
    pages of every large tensor to the system and fetches them back, zeroed, in the next step, which takes a fifth of
    the time of a step of cifar10, and more than half of the time of inference on photographs (two cores,
    EfficientNet-Lite0 at 224 px: 44 images/s, then 118). So it does with images above 8 megapixels: a JPEG of 12
    megapixels takes 73 ms in place of 99 to decode and resize.

    Where the C library is not glibc, nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no CDLL(None)
        return
    if not mallopt(M_MMAP_THRESHOLD, KEPT):
        mallopt(M_MMAP_THRESHOLD, KEPT_BY_OLDER)
    mallopt(M_TRIM_THRESHOLD, at_most)
