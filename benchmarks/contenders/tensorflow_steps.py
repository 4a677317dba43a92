"""Bare steps of the cifar10 network in TensorFlow's graph mode: forward, backward and update of one fixed batch.

    python tensorflow_steps.py BATCH THREADS STEPS    prints seconds a step, without the first ones

In an environment with TensorFlow. Neither distortion nor data loading nor averages: the best case for it.
"""

import os
import sys
import time

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

import tensorflow as tf

WARM_UP = 10
SHAPES = {
    "conv1": [5, 5, 3, 64],
    "conv2": [5, 5, 64, 64],
    "local3": [2304, 384],
    "local4": [384, 192],
    "softmax_linear": [192, 10],
}


def main(batch: int, threads: int, steps: int) -> float:
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    weights = {name: tf.Variable(tf.random.truncated_normal(shape, stddev=0.05)) for name, shape in SHAPES.items()}
    biases = {name: tf.Variable(tf.zeros(shape[-1])) for name, shape in SHAPES.items()}
    variables = [*weights.values(), *biases.values()]
    images = tf.random.normal([batch, 24, 24, 3])
    labels = tf.random.uniform([batch], maxval=10, dtype=tf.int32)

    def conv(x: tf.Tensor, name: str) -> tf.Tensor:
        return tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(x, weights[name], 1, "SAME"), biases[name]))

    def dense(x: tf.Tensor, name: str) -> tf.Tensor:
        return tf.matmul(x, weights[name]) + biases[name]

    def norm(x: tf.Tensor) -> tf.Tensor:
        return tf.nn.lrn(x, 4, bias=1.0, alpha=0.001 / 9.0, beta=0.75)

    def step() -> tf.Tensor:
        with tf.GradientTape() as tape:
            x = norm(tf.nn.max_pool2d(conv(images, "conv1"), 3, 2, "SAME"))
            x = tf.nn.max_pool2d(norm(conv(x, "conv2")), 3, 2, "SAME")
            x = tf.nn.relu(dense(tf.reshape(x, [batch, -1]), "local3"))
            logits = dense(tf.nn.relu(dense(x, "local4")), "softmax_linear")
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
            variable.assign_sub(0.1 * gradient)
        return loss

    compiled_step = tf.function(step)
    for _ in range(WARM_UP):
        compiled_step()
    began = time.perf_counter()
    for _ in range(steps):
        loss = compiled_step()
    loss.numpy()
    return (time.perf_counter() - began) / steps


if __name__ == "__main__":
    print(main(*map(int, sys.argv[1:])))
