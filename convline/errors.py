"""The exceptions for problems that users can fix, and the reason codes of rejected images.

ConvlineError             one sentence: what, where, what to do; commands exit 1 with it
├── ImageError            a file that cannot be used as an image; carries a reason code
└── ModelError            an ONNX file that cannot be trusted, or a provider that did not load

Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

from typing import Literal

# why an image was rejected, as `<output>.rejects.jsonl` and the report state it
Reason = Literal[
    "unreadable",  # it could not be opened or read, or its contents are damaged
    "not-an-image",  # a web page, a text, an archive, …
    "truncated",  # it ends too early
    "too-large",  # too many bytes or pixels
    "empty",  # it has no bytes or pixels
    "unsupported",  # a valid file of a format, colour space or bit depth that is not decoded
    "not-finite",  # the model's scores for it are NaN or infinite
    "timeout",  # decoding it took too long, and its process was ended
]


class ConvlineError(Exception):
    """A problem that the user can fix; the message says what, where and what to do."""


class ImageError(ConvlineError):
    """A file that cannot be used as an image.

    `reason` is the reject's reason code; `detail` explains it to a person.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason: Reason = reason
        self.detail = detail

    def without_traceback(self) -> ImageError:
        """A copy to keep: the frames of a traceback would hold the file's bytes in memory."""
        return ImageError(self.reason, self.detail)

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class ModelError(ConvlineError):
    """An ONNX file that cannot be trusted, or a provider that did not load."""
