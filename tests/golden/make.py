"""Golden values from TensorFlow: what the networks of the sources compute.

    python -m venv /tmp/tensorflow && /tmp/tensorflow/bin/pip install tensorflow-cpu==2.21.0
    /tmp/tensorflow/bin/python tests/golden/make.py

Writes tests/golden/tensorflow.npz. Nothing of convline is imported.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

import fixed
import numpy as np
import tensorflow as tf

Weights = dict[str, tf.Tensor]


def dense(x: tf.Tensor, w: Weights, layer: str) -> tf.Tensor:
    return tf.matmul(x, w[f"{layer}.weight"]) + w[f"{layer}.bias"]


def conv(x: tf.Tensor, w: Weights, layer: str, padding: str = "SAME") -> tf.Tensor:
    return tf.nn.conv2d(x, w[f"{layer}.weight"], 1, padding) + w[f"{layer}.bias"]


def local(x: tf.Tensor, w: Weights, layer: str) -> tf.Tensor:
    """Unshared weights, place by place, out of the patches that tf.image cuts."""
    patches = tf.image.extract_patches(x, [1, 3, 3, 1], [1, 1, 1, 1], [1, 1, 1, 1], "SAME")
    _, height, width, size = patches.shape
    kernel = tf.reshape(w[f"{layer}.weight"], [height, width, size, -1])
    return tf.einsum("bhwp,hwpo->bhwo", patches, kernel) + w[f"{layer}.bias"]


def flat(x: tf.Tensor) -> tf.Tensor:
    return tf.reshape(x, [x.shape[0], -1])


def pool2(x: tf.Tensor) -> tf.Tensor:
    return tf.nn.max_pool2d(x, 2, 2, "SAME")


def pool3(x: tf.Tensor) -> tf.Tensor:
    return tf.nn.max_pool2d(x, 3, 2, "SAME")


def norm(x: tf.Tensor) -> tf.Tensor:
    return tf.nn.local_response_normalization(x, 4, bias=1.0, alpha=0.001 / 9.0, beta=0.75)


def cifar10_trunk(x: tf.Tensor, w: Weights) -> tf.Tensor:
    x = norm(pool3(tf.nn.relu(conv(x, w, "conv1"))))
    return pool3(norm(tf.nn.relu(conv(x, w, "conv2"))))


def cifar10(x: tf.Tensor, w: Weights) -> tf.Tensor:
    x = tf.nn.relu(dense(flat(cifar10_trunk(x, w)), w, "local3"))
    return dense(tf.nn.relu(dense(x, w, "local4")), w, "softmax_linear")


def cifar10_local(x: tf.Tensor, w: Weights) -> tf.Tensor:
    x = tf.nn.relu(local(cifar10_trunk(x, w), w, "local3"))
    return dense(flat(tf.nn.relu(local(x, w, "local4"))), w, "softmax_linear")


def deep_mnist(x: tf.Tensor, w: Weights) -> tf.Tensor:
    x = pool2(tf.nn.relu(conv(x, w, "conv1")))
    x = pool2(tf.nn.relu(conv(x, w, "conv2")))
    return dense(tf.nn.relu(dense(flat(x), w, "fc1")), w, "fc2")


def slides_convnet(x: tf.Tensor, w: Weights) -> tf.Tensor:
    x = pool2(tf.nn.relu(conv(x, w, "block1.conv")))
    x = pool2(tf.nn.relu(conv(x, w, "block2.conv")))
    return dense(flat(x), w, "output")


def simple_convnet(x: tf.Tensor, w: Weights) -> tf.Tensor:
    x = pool2(tf.nn.relu(conv(x, w, "conv1", "VALID")))
    return dense(tf.nn.relu(dense(flat(x), w, "affine1")), w, "affine2")


def mlp(x: tf.Tensor, w: Weights) -> tf.Tensor:
    return dense(tf.sigmoid(dense(flat(x), w, "hidden")), w, "output")


def softmax_regression(x: tf.Tensor, w: Weights) -> tf.Tensor:
    return dense(flat(x), w, "output")


FORWARD: dict[str, Callable[[tf.Tensor, Weights], tf.Tensor]] = {
    function.__name__: function
    for function in (softmax_regression, mlp, simple_convnet, slides_convnet, deep_mnist, cifar10, cifar10_local)
}


def networks() -> dict[str, np.ndarray]:
    """Logits, loss and gradients of the mean cross-entropy (of large gradients every 101st value)."""
    golden = {}
    for name, forward in FORWARD.items():
        w = {key: tf.constant(value) for key, value in fixed.weights(name).items()}
        with tf.GradientTape() as tape:
            tape.watch(w)
            logits = forward(tf.constant(fixed.images(name)), w)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(fixed.labels(), logits)
            loss = tf.reduce_mean(losses)
        golden[f"{name}/logits"] = logits.numpy()
        golden[f"{name}/loss"] = loss.numpy()
        for key, gradient in tape.gradient(loss, w).items():
            values = gradient.numpy().ravel()
            golden[f"{name}/gradient/{key}"] = values if values.size <= 1000 else values[::101]
    return golden


def layers() -> dict[str, np.ndarray]:
    """SAME pools and convolutions at odd and even sizes and strides, and LRN on values far from zero."""
    golden = {}
    for side in (6, 7, 8, 9):
        x = fixed.state(f"layers {side}").randn(2, side, side + 3, 4).astype(np.float32)
        for kernel, stride in ((2, 2), (3, 2), (3, 1), (3, 3), (5, 2)):
            golden[f"pool/{side}/{kernel}/{stride}"] = tf.nn.max_pool2d(x, kernel, stride, "SAME").numpy()
            w = fixed.state(f"kernel {kernel}").randn(kernel, kernel, 4, 3).astype(np.float32)
            golden[f"conv/{side}/{kernel}/{stride}"] = tf.nn.conv2d(x, w, stride, "SAME").numpy()
    x = 30 * fixed.state("lrn").randn(2, 3, 4, 64).astype(np.float32)
    golden["lrn"] = norm(x).numpy()
    return golden


def images() -> dict[str, np.ndarray]:
    """Standardisation (constant and tiny-contrast images among them), brightness, contrast, centre crop."""
    x = fixed.pictures()
    floats = tf.cast(x, tf.float32)
    brighter = [tf.image.adjust_brightness(floats[i], delta) for i, delta in enumerate(fixed.BRIGHTNESS)]
    contrasted = [tf.image.adjust_contrast(floats[i], factor) for i, factor in enumerate(fixed.CONTRAST)]
    return {
        "standardized": tf.image.per_image_standardization(floats).numpy(),
        "brightness": tf.stack(brighter).numpy(),
        "contrast": tf.stack(contrasted).numpy(),
        "cropped": tf.image.resize_with_crop_or_pad(x, 4, 4).numpy(),
    }


def schedules() -> dict[str, np.ndarray]:
    """The tutorial's staircase, and 50 updates of a moving average with num_updates."""
    decay = tf.compat.v1.train.exponential_decay
    rates = [decay(0.1, step, 100, 0.1, staircase=True)().numpy() for step in range(0, 401, 25)]
    averages = []
    start, changes = fixed.average_values()
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        value = tf.compat.v1.get_variable("value", initializer=start)
        step = tf.compat.v1.placeholder(tf.int64, [])
        average = tf.compat.v1.train.ExponentialMovingAverage(0.9, num_updates=step)
        update = average.apply([value])
        delta = tf.compat.v1.placeholder(tf.float32, [6])
        change = value.assign_add(delta)
        session.run(tf.compat.v1.global_variables_initializer())
        for number, difference in enumerate(changes):
            session.run(change, {delta: difference})
            session.run(update, {step: number})
            averages.append(session.run(average.average(value)))
    return {"staircase": np.array(rates), "averages": np.array(averages)}


def first_loss() -> dict[str, np.ndarray]:
    """What the tutorial's training logs at step 0, as its first edition starts: cross-entropy and weight decay."""
    tf.random.set_seed(0)
    stds = {"conv1": 1e-4, "conv2": 1e-4, "local3": 0.04, "local4": 0.04, "softmax_linear": 1 / 192}
    biases = {"conv1": 0.0, "conv2": 0.1, "local3": 0.1, "local4": 0.1, "softmax_linear": 0.0}
    w = {}
    for key, shape in fixed.NETWORKS["cifar10"][1].items():
        layer, kind = key.split(".")
        is_bias = kind == "bias"
        w[key] = tf.fill(shape, biases[layer]) if is_bias else tf.random.truncated_normal(shape, stddev=stds[layer])
    logits = cifar10(tf.constant(fixed.images("cifar10", 128)), w)
    loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(fixed.labels(128), logits))
    decay = [0.004 * tf.nn.l2_loss(w[f"{layer}.weight"]) for layer in ("local3", "local4")]
    return {"cifar10/first_loss": tf.add_n([loss, *decay]).numpy()}


if __name__ == "__main__":
    golden: dict[str, Any] = networks() | layers() | images() | schedules() | first_loss()
    path = Path(__file__).with_name("tensorflow.npz")
    np.savez_compressed(path, tensorflow=tf.__version__, **golden)
    print(f"{path}: {len(golden)} arrays of TensorFlow {tf.__version__}, {path.stat().st_size} bytes")
