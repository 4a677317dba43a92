import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from pipeline.download import officials
from pipeline.engine.network import load_served, predictor
from pipeline.engine.run import Run
from pipeline.recipe import load, names
from serving.model import open_model
from tests.conftest import Cli, run_command
from tests.pipeline.helpers import image_folder


def metadata(path: Path) -> dict:
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
    told = metadata(model)
    assert set(told) == {
        "format", "classes", "image", "recipe", "dataset", "weights", "run", "evaluation", "parity", "probe", "versions"
    }  # fmt: skip
    assert told["classes"] == [str(digit) for digit in range(10)]
    assert told["weights"] == "averaged"
    assert told["run"]["step"] == 300
    assert told["parity"]["passed"]
    assert told["parity"]["provider"] == "cpu"
    assert told["evaluation"]["count"] == 359


def test_nothing_of_the_machine_is_inside(project: Path, model: Path) -> None:
    content = model.read_bytes()
    for trace in (str(project), "/work", "site-packages", "stack_trace", ".py", "Traceback"):
        assert trace.encode() not in content
    proto = onnx.load(model, load_external_data=False)
    assert not any(tensor.external_data for tensor in proto.graph.initializer)


def test_two_exports_in_two_processes_are_the_same_bytes(own_project: Path, model: Path) -> None:
    run_command(own_project, "pipeline", "export", "--output", own_project / "again.onnx")
    assert (own_project / "again.onnx").read_bytes() == model.read_bytes()


def test_the_proof_names_the_file_it_is_about(model: Path) -> None:
    proto = onnx.load(model)
    proof = metadata(model)["parity"]
    kept = [entry for entry in proto.metadata_props if entry.key != "convline.parity"]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    digest = hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()
    assert digest == proof["sha256_without_parity"]


def test_the_file_holds_the_averaged_weights_and_not_the_raw_ones(project: Path, model: Path) -> None:
    run = Run.open(project / "runs/digits")
    images = np.load(project / "data/digits/test.images.npy")
    served = open_model(model).run(images)[1]
    cpu = torch.device("cpu")
    averaged, raw = (predictor(load_served(run, which)[0], cpu)(images)[1] for which in ("averaged", "raw"))
    assert np.abs(served - averaged).max() < 1e-4
    assert np.abs(served - raw).max() > 1e-2


def test_preprocessing_is_inside_and_matches_numpy(project: Path) -> None:
    """The graph's first steps against the definition: (x - mean) / std of the training images."""
    images = np.load(project / "data/digits/train.images.npy").astype(np.float64)
    meta = json.loads((project / "data/digits/meta.json").read_text())
    assert meta["mean"] == pytest.approx([images.mean()])
    assert meta["std"] == pytest.approx([images.std()])
    served, _ = load_served(Run.open(project / "runs/digits"))
    seen = served.preprocessing(torch.from_numpy(images[:5].astype(np.uint8)))
    expected = (images[:5] - images.mean()) / images.std()
    np.testing.assert_allclose(seen.numpy()[:, 0], expected[..., 0], atol=1e-5)


def change_weight(proto: onnx.ModelProto) -> None:
    tensor = next(t for t in proto.graph.initializer if t.name.endswith("conv1.weight"))
    values = numpy_helper.to_array(tensor).copy()
    values[0, 0, 0, 0] += 0.05
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def inject_nan(proto: onnx.ModelProto) -> None:
    tensor = next(t for t in proto.graph.initializer if t.name.endswith("fc2.bias"))
    values = numpy_helper.to_array(tensor).copy()
    values[3] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


@pytest.mark.parametrize("spoil", [change_weight, inject_nan])
def test_a_failed_proof_leaves_the_earlier_file(own_project: Path, monkeypatch: pytest.MonkeyPatch, spoil) -> None:
    from pipeline import export
    from serving.errors import ConvlineError

    run = Run.open(own_project / "runs/digits")
    before = run.model.read_bytes()
    faithful = export.to_onnx

    def unfaithful(served, spec):
        proto = faithful(served, spec)
        spoil(proto)
        return proto

    monkeypatch.setattr(export, "to_onnx", unfaithful)
    with pytest.raises(ConvlineError):
        export.export(run, run.dataset(own_project / "data"))
    assert run.model.read_bytes() == before
    assert sorted(p.name for p in run.folder.iterdir() if p.name.startswith(".")) == []


def test_parity_proves_the_published_file_again(project: Path, model: Path, tmp_path: Path) -> None:
    by_run = run_command(project, "pipeline", "parity", "digits").stdout
    assert by_run.startswith("parity passed")
    copy = tmp_path / "elsewhere.onnx"
    shutil.copy(model, copy)
    report = json.loads(run_command(project, "pipeline", "parity", copy, "--json").stdout)
    assert report["passed"]
    assert report["images"] == 359 + 4 * 68
    assert report["probability_difference"]["largest"] <= 1e-5


def test_parity_refuses_a_file_of_another_step(own_project: Path) -> None:
    run = own_project / "runs/digits"
    state = torch.load(run / "checkpoints/step-300.pt", weights_only=True)
    torch.save(state | {"step": 301}, run / "checkpoints/step-301.pt")
    assert "export again" in run_command(own_project, "pipeline", "parity", status=1).stderr


def test_parity_finds_a_file_that_is_not_the_checkpoint(own_project: Path) -> None:
    run = own_project / "runs/digits"
    state = torch.load(run / "checkpoints/step-300.pt", weights_only=True)
    state["averaged"]["fc2.bias"][0] += 0.5
    torch.save(state, run / "checkpoints/step-300.pt")
    before = (run / "model.onnx").read_bytes()
    assert "parity FAILED" in run_command(own_project, "pipeline", "parity", status=1).stderr
    assert (run / "model.onnx").read_bytes() == before


def test_exporting_an_untrained_run_is_explained(own_project: Path) -> None:
    shutil.rmtree(own_project / "runs/digits/checkpoints")
    assert "has no checkpoint yet" in run_command(own_project, "pipeline", "export", status=1).stderr


def test_an_output_that_is_a_folder_is_refused(own_project: Path) -> None:
    (own_project / "there").mkdir()
    result = run_command(own_project, "pipeline", "export", "--output", "there", status=1)
    assert "there is no file that an export could replace" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("recipe", names())
def test_every_recipe_exports_and_is_proven(cli: Cli, tmp_path: Path, recipe: str) -> None:
    """On noise of the size of its dataset's images."""
    height, width, channels = officials()[load(recipe).data.dataset].image
    counts = {f"{split}/{label}": 12 for split in ("train", "test") for label in range(10)}
    image_folder(tmp_path / "noise", counts, (height, width), "L" if channels == 1 else "RGB")
    cli("pipeline", "preprocess", "noise", "--source", "noise")
    settings = ("--set", "data.validation=0", "--set", "train.evaluate_every=0", "--steps", 3)
    cli("pipeline", "train", recipe, "--dataset", "noise", "--tracking", "none", *settings)
    assert "every top-1 equal" in cli("pipeline", "export").stdout
