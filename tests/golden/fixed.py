"""Weights and inputs that the TensorFlow script and the tests make alike: NumPy's frozen RandomState."""

import zlib

import numpy as np

Shapes = dict[str, tuple[int, ...]]

# in TensorFlow's layout: convolutions height, width, in, out; dense in, out
NETWORKS: dict[str, tuple[tuple[int, int, int], Shapes]] = {
    "softmax_regression": ((28, 28, 1), {"output.weight": (784, 10), "output.bias": (10,)}),
    "mlp": (
        (28, 28, 1),
        {"hidden.weight": (784, 625), "hidden.bias": (625,), "output.weight": (625, 10), "output.bias": (10,)},
    ),
    "simple_convnet": (
        (28, 28, 1),
        {
            "conv1.weight": (5, 5, 1, 30),
            "conv1.bias": (30,),
            "affine1.weight": (12 * 12 * 30, 100),
            "affine1.bias": (100,),
            "affine2.weight": (100, 10),
            "affine2.bias": (10,),
        },
    ),
    "slides_convnet": (
        (28, 28, 1),
        {
            "block1.conv.weight": (5, 5, 1, 24),
            "block1.conv.bias": (24,),
            "block2.conv.weight": (5, 5, 24, 48),
            "block2.conv.bias": (48,),
            "output.weight": (7 * 7 * 48, 10),
            "output.bias": (10,),
        },
    ),
    "deep_mnist": (
        (28, 28, 1),
        {
            "conv1.weight": (5, 5, 1, 32),
            "conv1.bias": (32,),
            "conv2.weight": (5, 5, 32, 64),
            "conv2.bias": (64,),
            "fc1.weight": (7 * 7 * 64, 1024),
            "fc1.bias": (1024,),
            "fc2.weight": (1024, 10),
            "fc2.bias": (10,),
        },
    ),
    "cifar10": (
        (24, 24, 3),
        {
            "conv1.weight": (5, 5, 3, 64),
            "conv1.bias": (64,),
            "conv2.weight": (5, 5, 64, 64),
            "conv2.bias": (64,),
            "local3.weight": (6 * 6 * 64, 384),
            "local3.bias": (384,),
            "local4.weight": (384, 192),
            "local4.bias": (192,),
            "softmax_linear.weight": (192, 10),
            "softmax_linear.bias": (10,),
        },
    ),
    "cifar10_local": (
        (24, 24, 3),
        {
            "conv1.weight": (5, 5, 3, 64),
            "conv1.bias": (64,),
            "conv2.weight": (5, 5, 64, 64),
            "conv2.bias": (64,),
            "local3.weight": (36, 3 * 3 * 64, 64),  # place, (row, column, in), out
            "local3.bias": (6, 6, 64),
            "local4.weight": (36, 3 * 3 * 64, 32),
            "local4.bias": (6, 6, 32),
            "softmax_linear.weight": (6 * 6 * 32, 10),
            "softmax_linear.bias": (10,),
        },
    ),
}


BRIGHTNESS = (-63.0, 10.5, 0.0, 63.0)
CONTRAST = (0.2, 1.0, 1.8, 0.7)


def state(name: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(name.encode()))


def weights(network: str) -> dict[str, np.ndarray]:
    """float32, N(0, 0.05): at the source's 1e-4 a wrong padding could not be seen."""
    generator = state(network)
    return {name: (0.05 * generator.randn(*shape)).astype(np.float32) for name, shape in NETWORKS[network][1].items()}


def images(network: str, count: int = 8) -> np.ndarray:
    """float32 N(0, 1), [count, height, width, channels]."""
    return state(network + " images").randn(count, *NETWORKS[network][0]).astype(np.float32)


def labels(count: int = 8) -> np.ndarray:
    return np.arange(count) * 3 % 10


def average_values() -> tuple[np.ndarray, np.ndarray]:
    """A weight's first value, float32 [6], and 50 changes of it, float32 [50, 6]."""
    generator = state("average")
    return generator.randn(6).astype(np.float32), generator.randn(50, 6).astype(np.float32)


def pictures() -> np.ndarray:
    """uint8 [4, 9, 7, 3]: noise, one that is constant, one of the least contrast."""
    x = state("images").randint(0, 256, (4, 9, 7, 3)).astype(np.uint8)
    x[1] = 77
    x[2] = 100
    x[2, 0, 0, 0] = 101
    return x
