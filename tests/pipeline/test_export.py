import copy
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from convline.errors import ConvlineError
from convline.images import ImageSpec
from models.served_network import ServedNetwork
from pipeline import export
from pipeline.checkpoint import load_newest, save
from pipeline.exporting.graph import to_onnx
from pipeline.exporting.onnx_metadata import run_metadata
from pipeline.network import load_network, predictor
from pipeline.preparing.official_datasets import known_datasets
from pipeline.recipe import load, names
from pipeline.run import Run
from serving.model import open_model
from tests.conftest import Cli, run_command, run_process
from tests.pipeline.helpers import image_folder


def metadata(path: Path) -> dict[str, Any]:
    proto = onnx.load(path)
    return {entry.key.removeprefix("convline."): json.loads(entry.value) for entry in proto.metadata_props}


def test_the_file_keeps_the_contract(model: Path) -> None:
    proto = onnx.load(model)
    (image,), outputs = proto.graph.input, proto.graph.output
    assert (image.name, image.type.tensor_type.elem_type) == ("image", onnx.TensorProto.UINT8)
    dimensions = image.type.tensor_type.shape.dim
    assert dimensions[0].dim_param == "batch"
    assert [d.dim_value for d in dimensions[1:]] == [8, 8, 1]
    assert [output.name for output in outputs] == ["probability", "logit"]
    assert all(output.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for output in outputs)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 20)]
    onnx.checker.check_model(proto, full_check=True)


def test_the_metadata_names_everything(model: Path) -> None:
    entries = metadata(model)
    assert set(entries) == {
        "format", "classes", "image", "recipe", "dataset", "weights", "run", "evaluation", "parity", "probe", "versions"
    }  # fmt: skip
    assert entries["classes"] == [str(digit) for digit in range(10)]
    assert entries["weights"] == "averaged"
    assert entries["run"]["step"] == 300
    assert entries["parity"]["passed"]
    assert entries["parity"]["provider"] == "cpu"
    assert entries["evaluation"]["count"] == 359


def test_nothing_of_the_machine_is_inside(project: Path, model: Path) -> None:
    content = model.read_bytes()
    for trace in (str(project), "/work", "site-packages", "stack_trace", ".py", "Traceback"):
        assert trace.encode() not in content
    proto = onnx.load(model, load_external_data=False)
    assert not any(tensor.external_data for tensor in proto.graph.initializer)


def test_two_exports_in_two_processes_are_the_same_bytes(own_project: Path, model: Path) -> None:
    run_process(own_project, "pipeline", "export", "--output", own_project / "again.onnx")
    assert (own_project / "again.onnx").read_bytes() == model.read_bytes()
    for labels in (own_project / "again.labels.json", model.with_name("labels.json")):  # one beside each file
        assert json.loads(labels.read_text()) == [str(digit) for digit in range(10)]


def test_the_parity_metadata_has_the_hash_of_the_file(model: Path) -> None:
    proto = onnx.load(model)
    proof = metadata(model)["parity"]
    others = [entry for entry in proto.metadata_props if entry.key != "convline.parity"]
    del proto.metadata_props[:]
    proto.metadata_props.extend(others)
    digest = hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()
    assert digest == proof["sha256_without_parity"]


def test_the_file_holds_the_averaged_weights_and_not_the_raw_ones(project: Path, model: Path) -> None:
    run = Run.open(project / "runs/digits")
    images = np.load(project / "data/digits/test.images.npy")
    served = open_model(model).run(images)[1]
    cpu = torch.device("cpu")
    averaged, raw = (predictor(load_network(run, which)[0], cpu)(images)[1] for which in ("averaged", "raw"))
    assert np.abs(served - averaged).max() < 1e-4
    assert np.abs(served - raw).max() > 1e-2


def test_preprocessing_is_inside_and_matches_numpy(project: Path) -> None:
    """The graph's first steps against the definition: (x - mean) / std of the training images."""
    images = np.load(project / "data/digits/train.images.npy").astype(np.float64)
    meta = json.loads((project / "data/digits/meta.json").read_text())
    assert meta["mean"] == pytest.approx([images.mean()])
    assert meta["std"] == pytest.approx([images.std()])
    served, _ = load_network(Run.open(project / "runs/digits"))
    seen = served.preprocessing(torch.from_numpy(images[:5].astype(np.uint8)))
    expected = (images[:5] - images.mean()) / images.std()
    np.testing.assert_allclose(seen.numpy()[:, 0], expected[..., 0], atol=1e-5)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose run `photographs` has colours, a crop and batch normalisation, exported after 3 steps."""
    folder = tmp_path_factory.mktemp("photographs")
    counts = {f"{split}/{label}": 8 for split in ("train", "test") for label in "abc"}
    image_folder(folder / "source", counts, (13, 13))
    run_command(folder, "pipeline", "preprocess", "photographs", "--source", "source")
    settings = ["model.name=torchvision/resnet18", "preprocess.crop=8", "train.evaluate_every=0", "data.validation=0"]
    overrides = [word for setting in settings for word in ("--set", setting)]
    common = ("--dataset", "photographs", "--run", "photographs", "--steps", 3, "--tracking", "none", *overrides)
    run_command(folder, "pipeline", "train", "digits", *common)
    run_command(folder, "pipeline", "export")
    return folder


def change_tensor(served: ServedNetwork, part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace a parameter or buffer."""
    module, _, name = part.rpartition(".")
    owner = served.get_submodule(module)
    tensor = getattr(owner, name)
    with torch.no_grad():
        tensor.copy_(change(tensor.detach().clone()))


def swap_channels(served: ServedNetwork) -> None:
    cropped = served.preprocessing.cropped
    served.preprocessing.cropped = lambda images: cropped(images).flip(3)  # type: ignore[method-assign]


def move_crop(served: ServedNetwork) -> None:
    served.preprocessing.cropped = lambda images: images[:, 3:11, 2:10]  # type: ignore[method-assign]


def swap_classes(served: ServedNetwork) -> None:
    network = served.network
    served.network = nn.Sequential(network, Reorder())


class Reorder(nn.Module):
    def forward(self, logit: torch.Tensor) -> torch.Tensor:
        return logit[:, [1, 0, 2]]


class AddNan(nn.Module):
    def forward(self, logit: torch.Tensor) -> torch.Tensor:
        return torch.where(logit >= logit.amax(1, keepdim=True), torch.nan, logit)


def inject_nan(served: ServedNetwork) -> None:
    served.network = nn.Sequential(served.network, AddNan())


MUTATIONS: dict[str, Callable[[ServedNetwork], None]] = {
    "one weight": lambda served: change_tensor(
        served, "network.conv1.weight", lambda w: w.index_fill(0, torch.tensor(5), 0)
    ),
    "one bias": lambda served: change_tensor(served, "network.fc.bias", lambda b: b + torch.tensor([0, 0.05, 0])),
    "standardisation": lambda served: change_tensor(served, "preprocessing.mean", lambda mean: mean + 1),
    "class order": swap_classes,
    "crop offset": move_crop,
    "channel order": swap_channels,
    "batch normalisation": lambda served: change_tensor(served, "network.layer1.0.bn1.running_var", lambda v: v * 1.05),
    "NaN": inject_nan,
}


QUICK = ("one weight", "standardisation", "class order")  # the others are exported by `make test-all`


@pytest.mark.parametrize(
    "mutation", [name if name in QUICK else pytest.param(name, marks=pytest.mark.all) for name in MUTATIONS]
)
def test_a_change_between_pytorch_and_the_file_is_caught(
    photographs: Path, monkeypatch: pytest.MonkeyPatch, mutation: str
) -> None:
    run = Run.open(photographs / "runs/photographs")
    before = {path.name: path.read_bytes() for path in (run.model, run.folder / "parity.json")}

    def unfaithful(served: ServedNetwork, spec: ImageSpec) -> onnx.ModelProto:
        copied = copy.deepcopy(served)
        MUTATIONS[mutation](copied)
        return to_onnx(copied, spec)

    monkeypatch.setattr(export, "to_onnx", unfaithful)
    with pytest.raises(ConvlineError, match=r"self-test|parity FAILED|is not this run's model"):
        export.export(run, run.dataset(photographs / "data"))
    assert {name: (run.folder / name).read_bytes() for name in before} == before
    assert not [path for path in run.folder.iterdir() if path.name.startswith(".")]


def test_a_wrong_bias_below_a_saturated_softmax_is_not_published(
    own_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No probability shows it: with logits a hundred times as large, all are 0 or 1."""
    run = Run.open(own_project / "runs/digits")
    state = load_newest(run.folder / "checkpoints")
    assert state is not None
    for name in ("fc2.weight", "fc2.bias"):
        state["averaged"][name] *= 100
    save(run.folder / "checkpoints", 300, state)
    before = run.model.read_bytes()

    def unfaithful(served: ServedNetwork, spec: ImageSpec) -> onnx.ModelProto:
        copied = copy.deepcopy(served)
        change_tensor(copied, "network.fc2.bias", lambda bias: bias + 0.01 * torch.eye(10)[3])
        return to_onnx(copied, spec)

    monkeypatch.setattr(export, "to_onnx", unfaithful)
    with pytest.raises(ConvlineError, match=r"parity FAILED.*every top-1 equal.*mean Δlogit of a class is \d\.\de-06"):
        export.export(run, run.dataset(own_project / "data"))
    assert run.model.read_bytes() == before


def test_classes_in_another_order_are_caught(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.open(photographs / "runs/photographs")
    before = run.model.read_bytes()
    other_classes = {"classes": ["b", "a", "c"]}
    monkeypatch.setattr(export, "run_metadata", lambda *arguments: run_metadata(*arguments) | other_classes)
    with pytest.raises(ConvlineError, match="other classes"):
        export.export(run, run.dataset(photographs / "data"))
    assert run.model.read_bytes() == before


def test_a_failed_proof_is_exit_status_1(own_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command, exporting a file that differs in its last bias."""
    before = (own_project / "runs/digits/model.onnx").read_bytes()

    def unfaithful(served: ServedNetwork, spec: ImageSpec) -> onnx.ModelProto:
        model = to_onnx(served, spec)
        bias = next(tensor for tensor in model.graph.initializer if tensor.name == "network.fc2.bias")
        moved = onnx.numpy_helper.to_array(bias) + np.linspace(0, 4e-4, 10, dtype=np.float32)
        bias.CopyFrom(onnx.numpy_helper.from_array(moved, bias.name))
        return model

    monkeypatch.setattr(export, "to_onnx", unfaithful)
    result = run_command(own_project, "pipeline", "export", "digits", status=1)
    assert result.stderr.splitlines()[-1].startswith("error: parity FAILED")
    assert (own_project / "runs/digits/model.onnx").read_bytes() == before


def test_graphs_are_lean(photographs: Path, model: Path) -> None:
    """Batch normalisation is folded, the pool is a mean, and the graph begins with one transpose and one cast."""
    resnet = Counter(node.op_type for node in onnx.load(photographs / "runs/photographs/model.onnx").graph.node)
    assert resnet == {
        "Slice": 2, "Transpose": 1, "Cast": 1, "Sub": 1, "Mul": 1, "Conv": 20, "Relu": 17, "MaxPool": 1, "Add": 8,
        "ReduceMean": 1, "Reshape": 1, "Gemm": 1, "Softmax": 1,
    }  # fmt: skip
    digits = [node.name for node in onnx.load(model).graph.node]
    assert digits[:5] == [f"preprocessing/{op}" for op in ("Transpose", "Cast", "Sub", "Mul")] + ["network.conv1/Conv"]
    assert digits[-2:] == ["network.fc2/Gemm", "Softmax"]


def test_exporting_an_untrained_run_is_explained(own_project: Path) -> None:
    shutil.rmtree(own_project / "runs/digits/checkpoints")
    assert "has no checkpoint yet" in run_command(own_project, "pipeline", "export", status=1).stderr


def test_an_output_that_is_a_folder_is_refused(own_project: Path) -> None:
    (own_project / "folder").mkdir()
    result = run_command(own_project, "pipeline", "export", "--output", "folder", status=1)
    assert "folder is not a file that an export could replace" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("recipe", names())
def test_every_recipe_exports_and_passes_parity(cli: Cli, tmp_path: Path, recipe: str) -> None:
    """On noise of the size of its dataset's images; recipes for photographs, whose networks take any size, on 64 px."""
    dataset = known_datasets().get(load(recipe).data.dataset)
    height, width, channels = dataset.image if dataset else (64, 64, 3)
    counts = {f"{split}/{label}": 12 for split in ("train", "test") for label in range(10)}
    image_folder(tmp_path / "noise", counts, (height, width), "L" if channels == 1 else "RGB")
    cli("pipeline", "preprocess", "noise", "--source", "noise")
    settings = ("--set", "data.validation=0", "--set", "train.evaluate_every=0", "--steps", 3)
    cli("pipeline", "train", recipe, "--dataset", "noise", "--tracking", "none", *settings)
    assert "every top-1 equal" in cli("pipeline", "export").stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "vit_b_16"])
def test_torchvision_networks_pass_parity(cli_process: Cli, tmp_path: Path, name: str) -> None:
    """After a few steps on noise of 96 x 96 pixels."""
    counts = {f"{split}/{label}": 12 for split in ("train", "test") for label in "abcdef"}
    image_folder(tmp_path / "noise", counts, (96, 96))
    cli_process("pipeline", "preprocess", "noise", "--source", "noise")
    settings = [f"model.name=torchvision/{name}", "data.validation=0", "train.evaluate_every=0", "train.batch_size=16"]
    overrides = [word for setting in settings for word in ("--set", setting)]
    cli_process("pipeline", "train", "digits", "--dataset", "noise", "--tracking", "none", "--steps", 8, *overrides)
    assert "every top-1 equal" in cli_process("pipeline", "export").stdout
    report = json.loads((tmp_path / "runs/digits/parity.json").read_text())
    assert report["relative_logit_difference"]["largest"] < report["logit_tolerance"] / 4
