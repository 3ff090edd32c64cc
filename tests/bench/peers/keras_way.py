"""Peer: Keras on TensorFlow as notebooks for BraTS have it: the same U-Net and weights, `predict` over the slices of a scan."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from safetensors.numpy import load_file
from shared import MODALITIES, REGIONS, finished, loaded, main

EPSILON = 1e-5
"""Of batch norm, as torch has it."""


def unet(model: Path, size: int) -> keras.Model:
    """The network of a model folder: plain blocks with batch norm. Torch's kernels (O, I, H, W) are Keras's (H, W, I, O)."""
    config = json.loads((model / "model.json").read_text())["network"]
    if config["norm"] != "batch" or config["residual"] or config["context_slices"] or config["activation"] != "relu":
        raise SystemExit(f"{model}: a plain 2D U-Net with batch norm is what is written down here")
    weights = load_file(model / "weights.safetensors")
    values: dict[str, np.ndarray[Any, Any]] = {name: array.astype(np.float32) for name, array in weights.items()}
    given: list[tuple[keras.layers.Layer, list[np.ndarray[Any, Any]]]] = []

    def layer(made: keras.layers.Layer, numbers: list[np.ndarray[Any, Any]], x: Any) -> Any:
        given.append((made, numbers))
        return made(x)

    def block(name: str, x: Any) -> Any:
        for half in (1, 2):
            kernel = values[f"{name}.conv{half}.weight"].transpose(2, 3, 1, 0)
            norm = [values[f"{name}.norm{half}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")]
            x = layer(keras.layers.Conv2D(kernel.shape[-1], 3, padding="same", use_bias=False), [kernel], x)
            x = keras.layers.ReLU()(layer(keras.layers.BatchNormalization(epsilon=EPSILON), norm, x))
        return x

    depth = len(config["widths"])
    start = x = keras.Input((size, size, len(MODALITIES)))
    levels = []
    for number in range(depth):
        x = block(f"down.{number}", keras.layers.MaxPooling2D()(x) if number else x)
        levels.append(x)
    for number in reversed(range(depth - 1)):
        kernel, bias = values[f"lift.{number}.weight"].transpose(2, 3, 1, 0), values[f"lift.{number}.bias"]
        x = layer(keras.layers.Conv2DTranspose(kernel.shape[2], 2, strides=2), [kernel, bias], x)
        x = block(f"up.{number}", keras.layers.Concatenate()([levels[number], x]))
    head = [values["head.weight"].transpose(2, 3, 1, 0), values["head.bias"]]
    net = keras.Model(start, layer(keras.layers.Conv2D(len(REGIONS), 1, activation="sigmoid"), head, x))
    for made, numbers in given:
        made.set_weights(numbers)
    return net


def prepare(model: Path, size: int, out: Path) -> Callable[[Path], None]:
    """Load the network; returns what segments one case. One thread computes."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    net = unet(model, size)

    def segment(case: Path) -> None:
        voxels, affine = loaded(case)
        slices = voxels.astype(np.float32).transpose(3, 1, 2, 0)
        small = tf.image.resize(slices, (size, size))
        probability = net.predict(small, batch_size=16, verbose=0)
        regions = tf.image.resize(probability, slices.shape[1:3]).numpy() > 0.5
        finished(regions.transpose(3, 1, 2, 0), affine, case, out)

    return segment


if __name__ == "__main__":
    main(prepare)
