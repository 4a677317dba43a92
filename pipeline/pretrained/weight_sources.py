"""Where the pretrained weights of a recipe are, and what is known of them. To add a kind of weights, add it to
`find_source`, and to weight_names.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from convline.errors import ConvlineError
from models import TIMM, TORCHVISION
from pipeline import checkpoint
from pipeline.network import load_network
from pipeline.pretrained.downloads import file_of_repository, file_of_url, hub_path
from pipeline.pretrained.packages import packaged_weights
from pipeline.pretrained.tensor_files import read_tensors
from pipeline.pretrained.weight_names import HUB, PACKAGE, RUN, is_name
from pipeline.recipe_sections import ModelSection, Standardization
from pipeline.run import Run

# timm's word for the 1,000 classes of its networks
IMAGENET = "imagenet-1k"
# arguments in a repository's config.json that do not make it another network than the one of its name
SAME_NETWORK = {"num_classes", "in_chans", "img_size", "global_pool", "drop_rate", "drop_path_rate"}


@dataclass(frozen=True)
class TrainedWith:
    """The images that weights were trained with. `standardize`: "scale", "per-image", or mean and std of x / 255; None
    where it is not known. `word`: as the recipe of a run has it."""

    standardize: str | Standardization | None = None
    word: str | None = None
    image_size: list[int] | None = None  # height, width
    interpolation: str | None = None
    crop_pct: float | None = None

    def to_dict(self) -> dict[str, Any]:
        pixels = self.standardize
        known = {
            "standardize": pixels.model_dump() if isinstance(pixels, Standardization) else pixels,
            "image_size": self.image_size,
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
        }
        return {key: value for key, value in known.items() if value is not None}

    def description(self) -> str:
        """As `preprocess.standardize` is set by hand."""
        if isinstance(self.standardize, Standardization):
            return f"{{mean={rounded(self.standardize.mean)}, std={rounded(self.standardize.std)}}}"
        return str(self.standardize)


@dataclass(frozen=True)
class WeightSource:
    """Weights that a recipe names, not read yet.

    `name`: as in the recipe, without folders of this machine. `locate` returns their file, downloading it where
    necessary. `origin`: what else tells where they come from. `classes`: of their head, where known.
    `in_order`: their tensors have other names than the network's, in the same order. `timm_config`: timm's description.
    `tensors`: the weights of a run.
    """

    name: str
    trained_with: TrainedWith
    locate: Callable[[], Path]
    origin: dict[str, Any] = field(default_factory=dict)
    license: str | None = None
    classes: list[str] | None = None
    in_order: bool = False
    timm_config: Any = None
    tensors: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class PretrainedWeights:
    """Weights that a training starts from: `source`, their file and its SHA-256."""

    source: WeightSource
    path: Path
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """What a run and its ONNX file keep of them; without folders of this machine."""
        source = self.source
        known = {"name": source.name, **source.origin, "file": self.path.name, "sha256": self.sha256}
        known |= {"license": source.license, "preprocessing": source.trained_with.to_dict()}
        return {key: value for key, value in known.items() if value is not None}

    def read(self) -> dict[str, Tensor]:
        """The tensors by name. Raises ConvlineError as `read_tensors` does."""
        return read_tensors(self.path) if self.source.tensors is None else self.source.tensors


def find_source(model: ModelSection, runs_dir: Path) -> WeightSource:
    """The weights that a recipe's model names; `runs_dir` holds its runs.

    Raises ConvlineError where there are none, or where they are of another network.
    """
    weights = model.weights
    if weights.startswith(PACKAGE):
        return _of_package(weights.removeprefix(PACKAGE))
    if weights.startswith(RUN):
        return _of_run(model, runs_dir)
    if weights.startswith(HUB):
        return _of_repository(model, weights.removeprefix(HUB))
    if not is_name(weights):
        path = Path(weights).expanduser()
        return WeightSource(path.name, TrainedWith(), lambda: _existing(path))
    return _of_torchvision(model) if model.name.startswith(TORCHVISION) else _of_timm(model)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ConvlineError(
            f"model.weights: there is no file {path}; set it to the path of a .safetensors or .pth file"
        )
    return path


def _of_package(package: str) -> WeightSource:
    packaged = packaged_weights()[package]
    pixels = Standardization(mean=packaged.mean, std=packaged.std)
    size = [packaged.image_size, packaged.image_size]
    return WeightSource(
        PACKAGE + package,
        TrainedWith(pixels, image_size=size, interpolation=packaged.interpolation, crop_pct=packaged.crop_pct),
        packaged.path,
        {"package": package, "version": packaged.version, "source": packaged.source},
        packaged.license,
        _imagenet_classes() if packaged.classes == IMAGENET else None,
        in_order=packaged.names == "in order",
    )


def _of_run(model: ModelSection, runs_dir: Path) -> WeightSource:
    """The newest averaged weights of a run of the same network."""
    run = Run.find(runs_dir, model.weights.removeprefix(RUN))
    theirs = {"name": run.recipe.model.name, **run.recipe.model.options}
    ours = {"name": model.name, **model.options}
    if theirs != ours:
        raise ConvlineError(
            f"model.weights={model.weights}: {run.folder} is a run of {_as_text(theirs)}, and the recipe's network is "
            f"{_as_text(ours)}; set the same name and options, or choose another run"
        )
    served, step = load_network(run)
    word = run.recipe.preprocess.standardize
    pixels: str | Standardization = word
    if word == "per-channel":
        mean, std = run.info["dataset"]["mean"], run.info["dataset"]["std"]
        # as in Preprocessing, a constant channel has a std of 0
        pixels = Standardization(mean=[x / 255 for x in mean], std=[max(x, 1e-6) / 255 for x in std])
    return WeightSource(
        RUN + run.name,
        TrainedWith(pixels, word if isinstance(word, str) else None, image_size=list(served.preprocessing.output_size)),
        lambda: next(path for path in checkpoint.paths(run.folder / "checkpoints") if checkpoint.step_of(path) == step),
        {"run": run.info["id"], "step": step},
        classes=run.classes,
        tensors=served.network.state_dict(),
    )


def _as_text(options: Mapping[str, Any]) -> str:
    name, *rest = options.items()
    return ", ".join([str(name[1]), *(f"{key}={value}" for key, value in rest)])


def _of_torchvision(model: ModelSection) -> WeightSource:
    from torchvision import models

    members: Any = models.get_model_weights(model.name.removeprefix(TORCHVISION))
    chosen = members.DEFAULT if model.weights == "default" else members[model.weights]
    preset = chosen.transforms()
    mean, std = preset.mean, preset.std
    if model.name.removeprefix(TORCHVISION) in ("googlenet", "inception_v3"):
        # torchvision converts from ImageNet's mean and std to these within the network (transform_input)
        mean = std = [0.5, 0.5, 0.5]
    side, shorter = preset.crop_size[0], preset.resize_size[0]
    trained_with = TrainedWith(
        Standardization(mean=list(mean), std=list(std)),
        image_size=[side, side],
        interpolation=preset.interpolation.value,
        crop_pct=round(side / shorter, 3),
    )
    locate = partial(file_of_url, chosen.url, _where(model), _other_ways(model, trained_with))
    details = {"weights": chosen.name, "url": chosen.url}
    classes = list(chosen.meta["categories"])
    return WeightSource(model.weights, trained_with, locate, details, chosen.meta.get("license"), classes)


def _of_timm(model: ModelSection) -> WeightSource:
    import timm

    name = model.name.removeprefix(TIMM)
    try:
        config = timm.get_pretrained_cfg(name if model.weights == "default" else f"{name}.{model.weights}")
    except RuntimeError as error:
        raise ConvlineError(f"{_where(model)}: timm has no such weights ({error}); choose others") from error
    if config is None or not (config.hf_hub_id or config.url):
        raise ConvlineError(f"{_where(model)}: timm has no such weights; set model.weights=none, or a file's path")
    trained_with = _trained_with(config)
    remedy = _other_ways(model, trained_with)
    if config.hf_hub_id and not (config.url and hub_path(config.url).exists()):
        origin = {"weights": config.tag, "repository": config.hf_hub_id}
        names = _safe_names(config.hf_hub_filename or "pytorch_model.bin")
        locate = partial(file_of_repository, config.hf_hub_id.partition("@")[0], names, _where(model), remedy)
    else:
        origin = {"weights": config.tag, "url": config.url}
        locate = partial(file_of_url, config.url, _where(model), remedy)
    return WeightSource(
        model.weights, trained_with, locate, origin, config.license, _timm_classes(config), timm_config=config
    )


def _of_repository(model: ModelSection, repository: str) -> WeightSource:
    """A repository with config.json and model.safetensors, as timm writes them."""
    from timm.models import PretrainedCfg

    where, remedy = _where(model), "try again with a connection, or set model.weights to the path of a copy of its file"
    path = file_of_repository(repository, ["config.json"], where, remedy)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        architecture, described = content["architecture"], content["pretrained_cfg"]
        accepted = {each.name for each in fields(PretrainedCfg)} - {"state_dict", "file", "source"}
        config = PretrainedCfg(**{key: value for key, value in described.items() if key in accepted})
        config.num_classes = content.get("num_classes", config.num_classes)
        arguments = sorted(set(content.get("model_args") or {}) - SAME_NETWORK)
        trained_with = _trained_with(config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConvlineError(
            f"{where}: its config.json is not that of a network of timm ({type(error).__name__}); choose a repository "
            "whose library is timm"
        ) from error
    if TIMM + architecture != model.name or arguments:
        changed = f" with other {', '.join(arguments)}" if arguments else ""
        raise ConvlineError(
            f"{where}: the repository holds weights of {TIMM}{architecture}{changed}, and the recipe's network is "
            f"{model.name}; choose weights of the recipe's network"
        )
    names = _safe_names(config.hf_hub_filename or "pytorch_model.bin")
    locate = partial(file_of_repository, repository, names, where, _other_ways(model, trained_with))
    origin = {"repository": repository, "revision": path.parent.name}
    classes = content.get("label_names") or described.get("label_names") or _timm_classes(config)
    return WeightSource(model.weights, trained_with, locate, origin, config.license, classes, timm_config=config)


def _safe_names(name: str) -> list[str]:
    """The names under which the hub keeps a file of weights: as safetensors, then as it was."""
    stem = "model" if name == "pytorch_model.bin" else name.rpartition(".")[0].replace("pytorch_model", "model")
    return list(dict.fromkeys([f"{stem}.safetensors", name]))


def _trained_with(config: Any) -> TrainedWith:
    return TrainedWith(
        Standardization(mean=list(config.mean), std=list(config.std)),
        image_size=list(config.input_size[1:]),
        interpolation=config.interpolation,
        crop_pct=config.crop_pct,
    )


def _timm_classes(config: Any) -> list[str] | None:
    from timm.data import infer_imagenet_subset

    is_imagenet = infer_imagenet_subset({"num_classes": config.num_classes}) == IMAGENET
    return _imagenet_classes() if is_imagenet else None


def _imagenet_classes() -> list[str]:
    """The 1,000 classes by the names of their folders in ImageNet."""
    from timm.data import ImageNetInfo

    return list(ImageNetInfo(IMAGENET).label_names())


def _where(model: ModelSection) -> str:
    return f"cannot load the weights {model.weights} of {model.name}"


def _other_ways(model: ModelSection, trained_with: TrainedWith) -> str:
    """What to do where a file cannot be downloaded."""
    packaged = [PACKAGE + each.package for each in packaged_weights().values() if model.name in each.networks]
    ways = [
        f"set model.weights to the path of a copy of it, with preprocess.standardize={trained_with.description()}",
        *(f"set model.weights={name}" for name in packaged),
        "start with model.weights=none",
    ]
    return ", or ".join(ways)


def rounded(values: list[float]) -> str:
    return f"[{', '.join(f'{value:.6g}' for value in values)}]"
