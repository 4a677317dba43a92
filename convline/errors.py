"""What a user can mend. Everything else that goes wrong is a defect and keeps its traceback.

ConvlineError             one sentence: what, where, what to do; commands exit 1 with it
├── ImageError            one file cannot be used as an image; carries a reason code
└── ModelError            an ONNX file cannot be trusted, or a provider did not load
"""

from __future__ import annotations

from typing import Literal

Reason = Literal[
    "unreadable", "not-an-image", "truncated", "too-large", "empty", "unsupported", "not-finite", "timeout"
]


class ConvlineError(Exception):
    """A problem that the user can mend; the message says what, where and what to do."""


class ImageError(ConvlineError):
    """A file that cannot be used as an image.

    `reason` is the code that rejects carry; `detail` says more, for a person.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason: Reason = reason
        self.detail = detail

    def to_keep(self) -> ImageError:
        """The same without the frames that raised it: they hold the file's bytes."""
        return ImageError(self.reason, self.detail)

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class ModelError(ConvlineError):
    """An ONNX file that cannot be trusted, or a provider that did not load."""
