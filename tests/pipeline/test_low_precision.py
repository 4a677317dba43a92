"""`pipeline export --precision`: what stays float32, how much accuracy a file may lose, which layers stay in float."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch.nn import functional

from convline.errors import ConvlineError
from convline.images import ImageSpec
from models.layers import LocalResponseNorm
from models.preprocessing import Preprocessing
from models.served_network import ServedNetwork
from pipeline.dataset import Split
from pipeline.exporting.bias_correction import bias_corrections
from pipeline.exporting.blends import blended_batches
from pipeline.exporting.comparison import split_batches
from pipeline.exporting.float16 import to_float16
from pipeline.exporting.graph import check, float32_nodes, to_onnx
from pipeline.exporting.int8 import Quantizer
from pipeline.exporting.int8_layers import AccuracyOnImages, quantize_layers
from pipeline.exporting.lower_precision import accuracy_check
from pipeline.exporting.onnx_predictor import onnx_predictor
from pipeline.exporting.parity_result import NamedBatch, Parity
from pipeline.exporting.tolerances import TOLERANCES
from pipeline.recipe import load, names
from pipeline.run import Run
from serving.inspect import inspect
from serving.model import open_model
from serving.session import OUTPUTS, open_session
from tests.conftest import run_command
from tests.pipeline.test_export import metadata
from tests.serving.test_bound_runs import assert_same_bits
from tests.shared import shared_folder

LOWER = ("fp16", "int8")


@pytest.fixture(scope="module")
def files(project: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The digits run in each precision."""

    def make(folder: Path) -> None:
        for precision in LOWER:
            options = ("--precision", precision, "--output", folder / f"{precision}.onnx")
            shown = run_command(project, "pipeline", "export", *options).stdout
            assert "parity passed" in shown and "% of fp32" in shown and f" {precision}, " in shown

    folder = shared_folder(tmp_path_factory, "precisions", make)
    return {"fp32": project / "runs/digits/model.onnx"} | {name: folder / f"{name}.onnx" for name in LOWER}


@pytest.mark.parametrize("precision", LOWER)
def test_a_lower_precision_loses_little_accuracy_and_is_smaller(
    files: dict[str, Path], project: Path, precision: str
) -> None:
    path, full = files[precision], files["fp32"]
    images = np.load(project / "data/digits/test.images.npy")
    labels = np.load(project / "data/digits/test.labels.npy")
    hits = [(open_model(file).run(images)[0].argmax(1) == labels).sum() for file in (full, path)]
    assert hits[0] - hits[1] <= {"fp16": 1, "int8": 2}[precision]
    assert path.stat().st_size < {"fp16": 0.6, "int8": 0.4}[precision] * full.stat().st_size
    proof = metadata(path)["parity"]
    assert proof["passed"] and proof["precision"] == precision
    assert proof["precision_at_1"]["onnx"] == pytest.approx(hits[1] / len(labels))
    assert "speed" not in proof  # two exports are the same bytes, whatever the clock says
    report = json.loads(path.with_suffix(".parity.json").read_text())
    assert report["size"]["bytes"] <= path.stat().st_size
    assert set(report["speed"]["images_per_second"]) == {precision, "fp32", "PyTorch"}


@pytest.mark.parametrize("precision", LOWER)
def test_a_lower_precision_exported_twice_is_the_same_bytes(
    files: dict[str, Path], project: Path, tmp_path: Path, precision: str
) -> None:
    again = tmp_path / "again.onnx"
    run_command(project, "pipeline", "export", "--precision", precision, "--output", again)
    assert again.read_bytes() == files[precision].read_bytes()


@pytest.mark.parametrize("precision", LOWER)
def test_nothing_of_the_machine_is_inside_a_lower_precision(files: dict[str, Path], precision: str) -> None:
    content = files[precision].read_bytes()
    for trace in ("/tmp", "/work", "site-packages", ".py", "onnx.quant"):
        assert trace.encode() not in content


@pytest.mark.parametrize("precision", LOWER)
def test_io_binding_gives_the_same_bits_in_a_lower_precision(files: dict[str, Path], precision: str) -> None:
    assert_same_bits(open_model(files[precision], "cpu", 1), OUTPUTS, (7, 8, 8, 1))


@pytest.mark.parametrize("precision", LOWER)
def test_a_lower_precision_can_be_proven_again(files: dict[str, Path], project: Path, precision: str) -> None:
    assert "parity passed" in run_command(project, "pipeline", "parity", files[precision]).stdout
    against = run_command(project, "pipeline", "parity", files[precision], "--against", files["fp32"]).stdout
    assert "parity passed" in against


@pytest.mark.parametrize("precision", LOWER)
def test_parameters_and_multiply_adds_are_the_same_in_every_precision(files: dict[str, Path], precision: str) -> None:
    full, lower = (inspect(files[name]) for name in ("fp32", precision))
    for count in ("parameters", "multiply_adds"):
        assert lower["graph"][count] == full["graph"][count]
    assert lower["memory_bytes"]["weights"] < 0.6 * full["memory_bytes"]["weights"]


def cifar10() -> tuple[ServedNetwork, ImageSpec]:
    """The network with every kind of layer that must stay float32, as it is initialised."""
    from models import build

    torch.manual_seed(0)
    network = build("cifar10", (3, 24, 24), 10, conv_std=0.05)
    return ServedNetwork(Preprocessing((32, 32), 24, "per-image"), network).eval().requires_grad_(False), ImageSpec(
        32, 32, 3
    )


def images(count: int = 64) -> Iterator[np.ndarray]:
    yield np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)


def test_standardisation_normalisation_and_softmax_stay_float32() -> None:
    served, spec = cifar10()
    full = to_onnx(served, spec)
    float32 = float32_nodes(full, served)
    norms = [name for name, module in served.named_modules() if isinstance(module, LocalResponseNorm)]
    expected = {
        node.name
        for node in full.graph.node
        if node.name.startswith(("preprocessing/", *norms)) or node.name == "Softmax"
    }
    assert float32 == expected and len(expected) > 20
    float16, int8 = to_float16(full, float32), Quantizer(full, float32, images).quantize()
    for model in (float16, int8):
        check(model)
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
        types = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
        lower = (TensorProto.FLOAT16, TensorProto.INT8)
        types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        for node in model.graph.node:
            if node.name in float32:
                assert not any(types.get(name) in lower for name in (*node.input, *node.output)), node.name
        assert types["probability"] == types["logit"] == TensorProto.FLOAT
    layers = [node.name for node in full.graph.node if node.op_type in ("Conv", "Gemm") and node.name not in float32]
    weights = {
        tensor.name: tensor.data_type for tensor in float16.graph.initializer if tensor.name.endswith("weight.float16")
    }
    assert len(weights) == len(layers) == 5 and set(weights.values()) == {TensorProto.FLOAT16}


def test_float16_casts_only_where_the_precision_changes() -> None:
    """Into the first convolution, around each normalisation, and out of the logits."""
    served, spec = cifar10()
    full = to_onnx(served, spec)
    float16 = to_float16(full, float32_nodes(full, served))
    assert sum(node.op_type == "Cast" for node in float16.graph.node) == 1 + 1 + 2 * 2 + 1
    assert len(float16.graph.node) == len(full.graph.node) + 6


def transformer() -> tuple[ServedNetwork, ImageSpec]:
    """Two layers of a vision transformer; products of activations, a softmax in each layer."""
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    network = VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=4
    )
    torch.nn.init.normal_(network.heads.head.weight)
    served = ServedNetwork(Preprocessing((16, 16), standardize="scale"), network)
    return served.eval().requires_grad_(False), ImageSpec(16, 16, 3)


@pytest.mark.parametrize("precision", LOWER)
def test_a_transformer_runs_in_every_precision(precision: str) -> None:
    """onnxruntime 1.31 crashes on its float16 products, unless one of its optimisations is disabled."""
    served, spec = transformer()
    full = to_onnx(served, spec)
    float32 = float32_nodes(full, served)
    batch = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3), np.uint8)
    lower = (
        to_float16(full, float32) if precision == "fp16" else Quantizer(full, float32, lambda: iter([batch])).quantize()
    )
    check(lower)
    softmaxes = [node.name for node in full.graph.node if node.op_type == "Softmax"]
    assert len(softmaxes) == 3 and set(softmaxes) <= float32
    expected, actual = (onnx_predictor(model)(batch)[1] for model in (full, lower))
    scale = np.abs(expected).max()
    assert np.abs(actual - expected).max() < {"fp16": 0.01, "int8": 0.2}[precision] * scale


class Normalized(torch.nn.Module):
    """Divides by a length that is at least 1e-12, which float16 rounds to 0; black images have length 0."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last = torch.nn.Linear(192, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.nn.functional.normalize(x.flatten(1)))


def test_constants_that_float16_cannot_hold_stay_float32() -> None:
    served = ServedNetwork(Preprocessing((8, 8)), Normalized()).eval().requires_grad_(False)
    full = to_onnx(served, ImageSpec(8, 8, 3))
    float16 = to_float16(full, float32_nodes(full, served))
    batch = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    batch[0] = 0
    expected, actual = (onnx_predictor(model)(batch)[1] for model in (full, float16))
    np.testing.assert_allclose(actual, expected, atol=1e-3)
    assert any(tensor.data_type == TensorProto.FLOAT16 for tensor in float16.graph.initializer)


def test_weights_are_quantized_per_channel_in_seven_bits() -> None:
    """Sums of products of 8-bit weights overflow on processors without VNNI."""
    served, spec = cifar10()
    full = to_onnx(served, spec)
    model = Quantizer(full, float32_nodes(full, served), images).quantize()
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name in ("conv1", "conv2", "local3", "local4", "softmax_linear"):
        weight, scale = (tensors[f"network.{name}.weight_{part}"] for part in ("quantized", "scale"))
        assert weight.dtype == np.int8 and np.abs(weight).max() <= 64
        exact = served.get_parameter(f"network.{name}.weight").numpy()
        assert scale.shape == (len(exact),)
        restored = weight * scale.reshape(-1, *[1] * (exact.ndim - 1))
        assert np.abs(restored - exact).max() <= 0.51 * scale.max()


def test_calibration_reads_one_batch_at_a_time() -> None:
    served, spec = cifar10()
    full = to_onnx(served, spec)
    alive: list[int] = []

    def batches() -> Iterator[np.ndarray]:
        import weakref

        for seed in range(6):
            batch = np.random.default_rng(seed).integers(0, 256, (8, 32, 32, 3), np.uint8)
            alive.append(1)
            weakref.finalize(batch, alive.pop)
            assert len(alive) <= 2
            yield batch

    Quantizer(full, float32_nodes(full, served), batches)


class Outlier(torch.nn.Module):
    """Three layers. One output of the middle layer is 10,000 times as large as the others, and the last layer scales it
    back: 256 levels cannot represent both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = torch.nn.Linear(192, 32)
        self.middle = torch.nn.Linear(32, 32)
        self.last = torch.nn.Linear(32, 4)
        with torch.no_grad():
            self.middle.weight[0] *= 10_000
            self.last.weight[:, 0] /= 10_000

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.first(x.flatten(1)).relu()).relu())


def test_only_layers_that_cost_too_much_accuracy_stay_in_float() -> None:
    served = ServedNetwork(Preprocessing((8, 8)), Outlier()).eval().requires_grad_(False)
    full = to_onnx(served, ImageSpec(8, 8, 3))
    batch = np.random.default_rng(0).integers(0, 256, (256, 8, 8, 3), np.uint8)
    reference, _ = open_session(full.SerializeToString(), "cpu")
    expected = reference.run(["probability", "logit"], {"image": batch})

    class BatchAccuracy:
        def compare(self, candidate: onnx.ModelProto) -> Parity:
            session, _ = open_session(candidate.SerializeToString(), "cpu")
            parity = Parity(list("abcd"), TOLERANCES["int8"])
            named = NamedBatch([""] * 256, batch, labels=expected[1].argmax(1))
            parity.add(named, expected, session.run(["probability", "logit"], {"image": batch}))
            return parity

        def passes(self, candidate: onnx.ModelProto) -> bool:
            return self.compare(candidate).passed

        def probability_change(self, candidate: onnx.ModelProto) -> float:
            return self.compare(candidate).mean_probability_difference

    accuracy, float32 = BatchAccuracy(), float32_nodes(full, served)
    assert not accuracy.passes(Quantizer(full, float32, lambda: iter([batch])).quantize())
    model, float_layers = quantize_layers(full, float32, lambda: iter([batch]), accuracy)
    assert accuracy.passes(model)
    # the middle layer has the outlier among its outputs, the last one among its inputs
    assert float_layers == ["network.middle/Gemm", "network.last/Gemm"]
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert types["network.middle.weight"] == TensorProto.FLOAT
    assert types["network.first.weight_quantized"] == TensorProto.INT8


def test_int8_is_refused_where_no_choice_of_layers_is_accurate() -> None:
    class NeverAccurate:
        def passes(self, _: onnx.ModelProto) -> bool:
            return False

        def probability_change(self, _: onnx.ModelProto) -> float:
            return 1.0

    served = ServedNetwork(Preprocessing((8, 8)), Outlier()).eval().requires_grad_(False)
    full = to_onnx(served, ImageSpec(8, 8, 3))
    batch = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(ConvlineError, match="int8 costs this network too much accuracy"):
        quantize_layers(full, float32_nodes(full, served), lambda: iter([batch]), NeverAccurate())


def test_layers_are_chosen_on_validation_images_or_blends_of_training_images(project: Path) -> None:
    run = Run.open(project / "runs/digits")
    dataset = run.dataset(project / "data")
    full = onnx.load(run.model)
    for validation, expected in ((0, "2000 blends of two training images"), (100, "100 validation images")):
        recipe = load("digits", [f"data.validation={validation}"])
        _, description = accuracy_check(full, Run(run.folder, run.info, recipe), dataset)
        assert description == expected


def three_classes() -> Split:
    """Ten images of each of three classes: every pixel of an image is 10 times its class plus its number."""
    labels = np.repeat([0, 1, 2], 10)
    pixels = (10 * labels + np.tile(np.arange(10), 3)).astype(np.uint8)
    return Split("train", np.broadcast_to(pixels[:, None, None, None], (30, 8, 8, 3)), labels, np.arange(30)[::-1])


def test_blends_lie_between_images_of_different_classes() -> None:
    batches = list(blended_batches(three_classes(), 500))
    assert [len(batch.images) for batch in batches] == [64] * 7 + [52]
    assert all(batch.labels is None for batch in batches)
    images = np.concatenate([batch.images for batch in batches])
    assert images.dtype == np.uint8 and images.shape == (500, 8, 8, 3)
    again = np.concatenate([batch.images for batch in blended_batches(three_classes(), 500)])
    np.testing.assert_array_equal(images, again)
    # a blend of constant images is constant. Each of the 30 is as often in a blend as any other, so the mean is theirs
    assert (images == images[:, :1, :1, :1]).all() and images.max() <= 29
    assert abs(images.mean() - 14.5) < 1.0


def test_both_images_of_a_blend_are_never_of_one_class() -> None:
    labels = np.array([0, 0, 0, 1])
    pixels = np.array([0, 0, 0, 200], np.uint8)[:, None, None, None]
    split = Split("train", np.broadcast_to(pixels, (4, 2, 2, 1)), labels, np.arange(4))
    images = np.concatenate([batch.images for batch in blended_batches(split, 2000)])[:, 0, 0, 0]
    # shares from U(0, 1) of 0 and 200: had both ever been of class 0, more than 1/200 of them would be black
    assert (images == 0).mean() < 0.01 and abs(images.mean() - 100) < 5


class Brightness(torch.nn.Module):
    """Class 1 for images that are brighter than `threshold`, surer the farther from it."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.last = torch.nn.Linear(12, 2)
        with torch.no_grad():
            self.last.weight[:] = torch.tensor([[-1.0], [1.0]]) / 12
            self.last.bias[:] = torch.tensor([threshold, -threshold])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x.flatten(1))


def brightness_model(threshold: float) -> onnx.ModelProto:
    served = ServedNetwork(Preprocessing((2, 2), standardize="scale"), Brightness(threshold / 255))
    return to_onnx(served.eval().requires_grad_(False), ImageSpec(2, 2, 3))


def test_blends_show_a_moved_boundary_that_training_images_do_not(project: Path) -> None:
    described = {"classes": ["dark", "bright"], "image": ImageSpec(2, 2, 3).to_dict()}
    run = Run(project, {"dataset": described}, load("digits"))
    labels = np.repeat([0, 1], 50)
    images = np.broadcast_to((255 * labels)[:, None, None, None].astype(np.uint8), (100, 2, 2, 3))
    train = Split("train", images, labels, np.arange(100))
    full = brightness_model(128)

    def passes(read: Callable[[], Iterator[NamedBatch]], threshold: float) -> bool:
        return AccuracyOnImages(full, read, TOLERANCES["int8"], run).passes(brightness_model(threshold))

    assert passes(lambda: split_batches(train), 150)
    assert not passes(lambda: blended_batches(train, 2000), 150)
    assert passes(lambda: blended_batches(train, 2000), 129)


class Depthwise(torch.nn.Module):
    """A depthwise and a strided convolution, padded, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.depthwise = torch.nn.Conv2d(3, 6, 3, padding=1, groups=3)
        self.strided = torch.nn.Conv2d(6, 5, (3, 2), stride=2, padding=1)
        self.last = torch.nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.strided(self.depthwise(x)).mean((2, 3)))


def test_biases_take_back_what_rounded_weights_add_on_average() -> None:
    """Against PyTorch: each layer with the errors of its weights, on the inputs that it has in float32."""
    network = Depthwise()
    served = ServedNetwork(Preprocessing((8, 8), standardize="scale"), network).eval().requires_grad_(False)
    full = to_onnx(served, ImageSpec(8, 8, 3))
    batches = [
        np.random.default_rng(seed).integers(0, 256, (size, 8, 8, 3), np.uint8) for seed, size in ((0, 40), (1, 9))
    ]
    quantizer = Quantizer(full, float32_nodes(full, served), lambda: iter(batches))
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in quantizer.quantize().graph.initializer}

    def error_of_weights(name: str) -> torch.Tensor:
        integers, scale = (tensors[f"network.{name}.weight_{part}"] for part in ("quantized", "scale"))
        rounded = torch.from_numpy(integers * scale.reshape(-1, *[1] * (integers.ndim - 1)))
        return served.get_parameter(f"network.{name}.weight") - rounded

    def check_correction(name: str, expected: torch.Tensor) -> None:
        """Of the bias, which is stored in steps of the product of two scales."""
        quantized, scale = (tensors[f"network.{name}.bias_quantized{part}"] for part in ("", "_scale"))
        correction = quantized * scale - served.get_parameter(f"network.{name}.bias").numpy()
        assert (np.abs(correction - expected.numpy()) <= 0.6 * scale).all()
        assert (np.abs(expected.numpy()) > 10 * scale).any()

    x = torch.from_numpy(np.concatenate(batches)).permute(0, 3, 1, 2) / 255.0
    error = error_of_weights("depthwise")
    check_correction("depthwise", functional.conv2d(x, error, padding=1, groups=3).mean((0, 2, 3)))
    x = network.depthwise(x)
    error = error_of_weights("strided")
    check_correction("strided", functional.conv2d(x, error, stride=2, padding=1).mean((0, 2, 3)))
    x = network.strided(x).mean((2, 3))
    check_correction("last", (x @ error_of_weights("last").T).mean(0))


class Tokens(torch.nn.Module):
    """Linear layers on tokens, as in transformers: ONNX has no Gemm for these, but MatMul and Add."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(24, 16)
        self.last = torch.nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x.permute(0, 2, 3, 1).flatten(2)).relu()).mean(1)


def test_biases_that_are_added_to_products_of_matrices_are_corrected() -> None:
    network = Tokens()
    served = ServedNetwork(Preprocessing((8, 8), standardize="scale"), network).eval().requires_grad_(False)
    full = to_onnx(served, ImageSpec(8, 8, 3))
    assert sum(node.op_type == "MatMul" for node in full.graph.node) == 2
    batch = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), np.uint8)
    float32 = float32_nodes(full, served)
    quantizer = Quantizer(full, float32, lambda: iter([batch]))
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in quantizer.quantize().graph.initializer}
    correction = {
        each.layer: each for each in bias_corrections(full, quantizer.quantize(), quantizer.layers, iter([batch]))
    }
    assert len(correction) == 2
    layer = next(node for node in full.graph.node if node.op_type == "MatMul")  # the first
    integers, scale = (tensors[f"{layer.input[1]}_{part}"] for part in ("quantized", "scale"))
    error = network.first.weight.numpy().T - integers * scale
    tokens = (batch / 255.0).reshape(-1, 24)
    np.testing.assert_allclose(correction[layer.name].change, (tokens @ error).mean(0), atol=1e-6)


class Twice(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = torch.nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared(self.shared(x.flatten(1)).relu())


def test_layers_that_share_their_weights_keep_their_bias() -> None:
    served = ServedNetwork(Preprocessing((2, 2), standardize="scale"), Twice()).eval().requires_grad_(False)
    full = to_onnx(served, ImageSpec(2, 2, 3))
    batch = np.random.default_rng(0).integers(0, 256, (64, 2, 2, 3), np.uint8)
    model = Quantizer(full, float32_nodes(full, served), lambda: iter([batch])).quantize()
    expected, actual = (onnx_predictor(each)(batch)[1] for each in (full, model))
    assert np.abs(actual - expected).max() < 0.05 * np.abs(expected).max()


def test_a_network_that_float16_cannot_hold_is_refused_and_the_file_stays(own_project: Path) -> None:
    path = own_project / "runs/digits/checkpoints/step-300.pt"
    state = torch.load(path, weights_only=True)
    state["averaged"]["conv1.weight"] *= 1e4  # float16 ends at 65,504, in steps of 32
    state["averaged"]["conv1.bias"] += 65_000
    state["averaged"]["conv2.weight"] /= 1e4
    torch.save(state, path)
    before = (own_project / "runs/digits/model.onnx").read_bytes()
    error = run_command(own_project, "pipeline", "export", "--precision", "fp16", status=1).stderr
    assert "parity FAILED" in error or "not finite" in error  # processors that add in float32 only lose digits
    assert (own_project / "runs/digits/model.onnx").read_bytes() == before


@pytest.fixture(scope="module")
def real(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the datasets mnist and cifar10-jpg, and those of the recipes photos and photos-scratch."""
    folder = tmp_path_factory.mktemp("real")
    run_command(folder, "pipeline", "preprocess", "mnist", "--mirror", f"file://{test_data}/mnist")
    run_command(folder, "pipeline", "preprocess", "cifar10-jpg", "--source", test_data / "cifar10-jpg.tar.gz")
    for recipe in ("photos", "photos-scratch"):
        source = ("--source", test_data / "cats-dogs.tar", "--recipe", recipe)
        run_command(folder, "pipeline", "preprocess", load(recipe).data.dataset, *source)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [name for name in names() if name not in ("digits", "svhn")])
def test_every_recipe_in_every_precision(real: Path, recipe: str) -> None:
    """After 300 steps on real images."""
    dataset = ("--dataset", "cifar10-jpg") if recipe.startswith("cifar10") else ()
    settings = ("--steps", 300, "--set", "train.evaluate_every=0", "--tracking", "none")
    run_command(real, "pipeline", "train", recipe, *dataset, *settings)
    sizes = {}
    for precision in TOLERANCES:
        run_command(real, "pipeline", "export", recipe, "--precision", precision)
        report = json.loads((real / f"runs/{recipe}/parity.json").read_text())
        count = report["images"] - 4 * (64 + 4)  # without the hostile images
        lost = round(count * (report["precision_at_1"]["pytorch"] - report["precision_at_1"]["onnx"]))
        allowed = {"fp32": 0, "fp16": max(1, 0.001 * count), "int8": max(2, 0.005 * count)}
        assert report["passed"] and lost <= allowed[precision]
        assert set(report["speed"]["images_per_second"]) == {precision, "fp32", "PyTorch"}
        if precision == "fp32":
            assert report["probability_difference"]["largest"] <= 1e-5 and report["top1_differences"] == 0
        sizes[precision] = (real / f"runs/{recipe}/model.onnx").stat().st_size
    assert sizes["fp32"] <= 1_000_000 or sizes["int8"] <= 0.3 * sizes["fp32"]
