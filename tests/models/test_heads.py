"""The layers that give one score per class."""

import pytest
import torch

import models

# read from the sources of the networks
OWN = {
    "cifar10": "softmax_linear", "cifar10_local": "softmax_linear", "deep_mnist": "fc2", "digits_convnet": "fc2",
    "mlp": "output", "simple_convnet": "affine2", "slides_convnet": "output", "softmax_regression": "output",
}  # fmt: skip
TORCHVISION = {
    "alexnet": "classifier.6", "convnext_tiny": "classifier.2", "googlenet": "fc", "inception_v3": "fc",
    "maxvit_t": "classifier.5", "mobilenet_v3_small": "classifier.3", "regnet_y_400mf": "fc", "resnet18": "fc",
    "squeezenet1_0": "classifier.1", "swin_t": "head", "vit_b_32": "heads.head",
}  # fmt: skip
TIMM = {
    "convnext_atto": ["head.fc"], "deit_tiny_distilled_patch16_224": ["head", "head_dist"],
    "edgenext_xx_small": ["head.fc"], "efficientnet_lite0": ["classifier"],
    "levit_128s": ["head.linear", "head_dist.linear"], "levit_384_s8": ["head.linear", "head_dist.linear"],
    "mobilenetv4_conv_small": ["classifier"], "nasnetalarge": ["last_linear"], "regnety_002": ["head.fc"],
    "resnet18": ["fc"], "swin_tiny_patch4_window7_224": ["head.fc"], "test_vit": ["head"],
    "tf_efficientnet_lite0": ["classifier"], "vit_tiny_patch16_224": ["head"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        *((name, (3, 24, 24), [head]) for name, head in OWN.items()),
        *((f"torchvision/{name}", (3, 224, 224), [head]) for name, head in TORCHVISION.items()),
        *((f"timm/{name}", (3, 224, 224), head) for name, head in TIMM.items()),
    ],
)
def test_the_head_of_a_network_is_known(name: str, shape: tuple[int, int, int], expected: list[str]) -> None:
    assert models.head_layers(name, shape, 7) == expected


def test_the_head_does_not_depend_on_the_number_of_classes_channels_or_options() -> None:
    assert models.head_layers("timm/test_vit", (1, 32, 32), 1) == ["head"]
    assert models.head_layers("mlp", (1, 8, 8), 64, hidden_size=64) == ["output"]


@pytest.mark.parametrize("name", ["torchvision/regnet_y_400mf", "torchvision/resnet18", "timm/test_vit", "mlp"])
def test_looking_for_the_head_draws_no_random_numbers(name: str) -> None:
    before = torch.get_rng_state()
    models.head_layers(name, (3, 64, 64), 7)
    assert torch.equal(torch.get_rng_state(), before)
