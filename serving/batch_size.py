"""The default batch size, which the proof of a model (`pipeline export`, `pipeline parity`) uses as well.

onnxruntime may choose other kernels for another batch shape, so a model is proven on the shape that serves it.
`serving.auto_batch_size` measures the size for `--batch-size auto`.
"""

from __future__ import annotations

SERVING_BATCH = 64  # images
