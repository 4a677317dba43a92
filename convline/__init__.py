"""convline: train image classifiers, export them to ONNX, prove the files, classify images.

from convline import Classifier, train

run = train("digits")
run.evaluate()["precision_at_1"]
run.export().path
with Classifier("runs/digits/model.onnx") as classifier:
    classifier.classify(["a.png"])

The public names are imported when they are first used: `import convline` imports neither numpy nor torch, and
`Classifier` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convline.errors import ConvlineError, ImageError, ModelError
    from pipeline.python_api import TrainedRun, evaluate, export, preprocess, train
    from serving import Classifier, Prediction, Reject

__all__ = [
    "Classifier",
    "ConvlineError",
    "ImageError",
    "ModelError",
    "Prediction",
    "Reject",
    "TrainedRun",
    "evaluate",
    "export",
    "preprocess",
    "train",
]

_MODULES = {
    "convline.errors": ("ConvlineError", "ImageError", "ModelError"),
    "pipeline.python_api": ("TrainedRun", "evaluate", "export", "preprocess", "train"),
    "serving": ("Classifier", "Prediction", "Reject"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
