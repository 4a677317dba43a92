"""`export --unfamiliar`: fit to training images what tells how far an image is from them, in units that validation
images set; test images only show the result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from convline.errors import ConvlineError
from models import head_layers
from models.served_network import ServedNetwork
from models.unfamiliarity import ImageFeatures, Unfamiliarity
from pipeline.dataset import Dataset
from pipeline.exporting.comparison import split_batches
from pipeline.exporting.confidence import SPLITS
from pipeline.exporting.lower_precision import draw
from pipeline.exporting.onnx_predictor import onnx_predictor
from pipeline.metrics import wilson_interval
from pipeline.run import Run
from serving.model_file import CONSTANT_PREFIX

# in trials with cifar10 the AUROC of textures against test images was 0.80 with 128 components, 0.84 with 256, that of
# MNIST 0.83 and 0.84; with photographs those of both, and of CIFAR-10, were above 0.999 with 16 to 256
MOST_COMPONENTS = 256
FITTED_IMAGES = 2000  # at most; on cifar10 6,000 are no better
QUANTILE = 0.99  # of the validation images, whose distance is 1
STAGE_DEPTH = 2  # names of stages have at most so many parts: "layer1", "blocks.0"
SMALLEST_SHARE = 1e-9  # of the total variance: a smaller variance is this one
PREFIX = f"{CONSTANT_PREFIX}unfamiliarity."  # of the names of the constants in the graph


def fit_unfamiliarity(served: ServedNetwork, run: Run, dataset: Dataset) -> Unfamiliarity:
    """Principal components of the features of training images; distances are in standard deviations."""
    features = _image_features(served, run)
    images = draw(run.split(dataset, "train"), FITTED_IMAGES, seed=3)
    with features.seen_in(served.network) as seen, torch.inference_mode():

        def compute(images: NDArray[np.uint8]) -> Tensor:
            served(torch.from_numpy(np.ascontiguousarray(images)))
            return features(seen)

        x = torch.cat([compute(batch.images) for batch in split_batches(images)]).double()
    if not x.isfinite().all():
        raise ConvlineError(f"{run.folder} gives features that are not finite; there is nothing to publish")
    mean = x.mean(0)
    _, singular_values, directions = torch.linalg.svd(x - mean, full_matrices=False)
    variances = singular_values.square() / len(x)
    total, smallest = variances.sum(), SMALLEST_SHARE * variances.sum().clamp(min=SMALLEST_SHARE)
    kept = max(1, min(MOST_COMPONENTS, min(x.shape) // 2))
    # of all other directions; in those beyond the rank of x it is 0
    residual = (total - variances[:kept].sum()) / max(1, x.shape[1] - kept)
    return Unfamiliarity(
        features,
        mean.float(),
        directions[:kept].T.contiguous().float(),
        variances[:kept].clamp(min=smallest).sqrt().float(),
        residual.clamp(min=smallest).sqrt().float(),
    )


def _image_features(served: ServedNetwork, run: Run) -> ImageFeatures:
    """Features of the last layer at each resolution, and of what the head takes in, where the network has one head."""
    shape = (run.spec.channels, *served.preprocessing.output_size)
    model = run.recipe.model
    heads = head_layers(model.name, shape, len(run.classes), **model.options)
    head = heads[0] if len(heads) == 1 else None
    maps = last_maps(served.network, shape, head)
    if not maps and head is None:
        raise ConvlineError(f"{model.name} has no layer whose values --unfamiliar could use; export without it")
    return ImageFeatures(maps, head)


def last_maps(network: nn.Module, shape: tuple[int, int, int], head: str | None) -> list[str]:
    """The layers that compute the last map of each resolution, by their names.

    Only whole stages and layers beside them, not the layers inside (of "blocks.0.conv", say). Left out are maps of one
    pixel, those whose mean the head takes in, layers that are used several times, and maps with the channels last,
    which have other proportions than the image.
    """
    maps: list[tuple[str, Tensor]] = []
    taken: list[Tensor] = []

    def record(name: str) -> Callable[[Any, Any, Any], None]:
        return lambda _, __, output: maps.append((name, output)) if _is_map(output, shape) else None

    layers = [(name, layer) for name, layer in network.named_modules() if name and name.count(".") < STAGE_DEPTH]
    hooks = [layer.register_forward_hook(record(name)) for name, layer in layers]
    if head:
        hooks.append(network.get_submodule(head).register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0])))
    with torch.inference_mode():
        network(torch.zeros((1, *shape)))
    for hook in hooks:
        hook.remove()
    uses = Counter(name for name, _ in maps)
    width_of_head = taken[0].shape[1] if taken and taken[0].ndim == 2 else None
    # of equal keys, the last one stays
    last = {output.shape[2:]: name for name, output in maps if uses[name] == 1 and output.shape[1] != width_of_head}
    return list(last.values())


def _is_map(output: Any, shape: tuple[int, int, int]) -> bool:
    """Whether a layer gives a map of several pixels, with the proportions of the image to a pixel."""
    if not isinstance(output, Tensor) or output.ndim != 4 or output.shape[2:] == (1, 1):
        return False
    (height, width), (mapped_height, mapped_width) = shape[1:], output.shape[2:]
    return abs(mapped_height * width - mapped_width * height) <= max(height, width)


def set_unit(served: ServedNetwork, models: Sequence[onnx.ModelProto], run: Run, dataset: Dataset) -> dict[str, Any]:
    """Change the unit of distances, in the network and in `models`, so that 99 of 100 validation images are no further
    away than 1, as the last of the models computes it; returns the metadata `unfamiliar`."""
    unfamiliarity, exported = served.unfamiliarity, models[-1]
    assert unfamiliarity is not None
    distances = _distances(exported, run, dataset, "validation")
    if not np.isfinite(distances).all() or not distances.max() > 0:
        raise ConvlineError(
            f"{run.folder} gives distances of validation images that are no use; leave out --unfamiliar"
        )
    unit = np.float32(np.quantile(distances, QUANTILE, method="higher"))
    for name in ("deviations", "residual_deviation"):
        scaled = getattr(unfamiliarity, name).mul_(float(unit)).numpy()
        for model in models:
            (constant,) = (tensor for tensor in model.graph.initializer if tensor.name == PREFIX + name)
            constant.CopyFrom(numpy_helper.from_array(scaled, constant.name))
    return {
        "maps": list(unfamiliarity.features.maps),
        "head": unfamiliarity.features.head,
        "components": len(unfamiliarity.deviations),
        "quantile": QUANTILE,
        **{split: _shares(_distances(exported, run, dataset, split)) for split in SPLITS},
    }


def _distances(model: onnx.ModelProto, run: Run, dataset: Dataset, split: str) -> NDArray[np.float32]:
    predict = onnx_predictor(model)
    return np.concatenate([predict(batch.images)[2] for batch in split_batches(run.split(dataset, split))])


def _shares(distances: NDArray[np.float32]) -> dict[str, Any]:
    """How many images are further away than 1, with the 95% interval of their share."""
    count, above = len(distances), int((distances > 1).sum())
    return {"count": count, "above_1": above, "interval": list(wilson_interval(above, count))}


def from_graph(model: onnx.ModelProto, metadata: dict[str, Any]) -> Unfamiliarity:
    """What an exported graph computes, as a module: with the constants of the graph."""
    names = ("mean", "components", "deviations", "residual_deviation")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    values = [torch.tensor(numpy_helper.to_array(tensors[PREFIX + name])) for name in names]
    return Unfamiliarity(ImageFeatures(metadata["maps"], metadata["head"]), *values)


def unfamiliar_lines(metadata: dict[str, Any]) -> list[str]:
    """What `set_unit` found, for the terminal."""
    found = metadata.get("unfamiliar")
    if not found:
        return []
    texts = []
    for split in SPLITS:
        of_split = found[split]
        low, high = of_split["interval"]
        texts.append(f"{split} {of_split['above_1']} of {of_split['count']} ({low:.4f} to {high:.4f})")
    return [f"unfamiliar > 1  {', '.join(texts)}"]
