"""Classify images with an exported model; needs no torch.

from convline import Classifier  # or from serving

with Classifier("runs/digits/model.onnx") as classifier:
    classifier.classify(["a.png", jpeg_bytes, pillow_image, array], top_k=3)
    classifier.classify_arrays(images)  # uint8 [n, height, width, channels] of the model's size

The path of a file: `convline.inputs.listing` finds it, `convline.images` decodes it, `serving.model` runs the network,
`serving.journal` keeps the result, `serving.tables` writes it. `serving.predict` shares this work among processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convline.errors import ConvlineError, ImageError, ModelError

if TYPE_CHECKING:
    from serving.classifier import Classifier
    from serving.records import Prediction, Reject

__all__ = ["Classifier", "ConvlineError", "ImageError", "ModelError", "Prediction", "Reject"]


def __getattr__(name: str) -> Any:
    # onnxruntime and numpy take 0.4 s to import: `serving --help` does not need them
    if name in ("Classifier", "Prediction", "Reject"):
        from serving import classifier

        return getattr(classifier, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
