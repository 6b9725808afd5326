"""Makes keras_efficientnetv2_s.npz, what Keras's EfficientNetV2-S computes with random weights that a seed gives.

Run once, with TensorFlow, which the project and its tests do not need:

    pip install tensorflow-cpu tf_keras
    python tests/data/make_keras_efficientnet.py
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("keras_efficientnetv2_s.npz")


def seeded_weights(names: Iterable[str], shapes: Iterable[tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Random weights, the same everywhere: numpy keeps RandomState's stream as it is."""
    random = np.random.RandomState(0)
    weights = {}
    for name, shape in zip(names, shapes, strict=True):
        variable = name.rsplit("/", 1)[-1].removesuffix(":0")
        value = random.standard_normal(shape)
        if "kernel" in variable:
            fan_in = np.prod(shape[:2]) if variable == "depthwise_kernel" else np.prod(shape[:3])
            value *= np.sqrt(2 / fan_in)
        elif variable in ("gamma", "moving_variance"):
            value = np.exp(0.2 * value)
            if "project_bn/gamma" in name:
                value *= 0.3  # sums of many blocks stay small
        else:
            value *= 0.2
        weights[name] = value.astype(np.float32)
    return weights


def main() -> None:
    import os

    os.environ["TF_USE_LEGACY_KERAS"] = "1"  # the original project's Keras 2, whose HDF5 files hold names
    import tensorflow as tf

    images = np.random.RandomState(1).randint(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    model = tf.keras.applications.EfficientNetV2S(include_top=False, weights=None, input_shape=(64, 64, 3))
    names = [weight.name for weight in model.weights]
    shapes = [tuple(weight.shape) for weight in model.weights]
    model.set_weights(list(seeded_weights(names, shapes).values()))
    features = model(images.astype(np.float32), training=False).numpy()
    padded_shapes = np.array([[*shape, *[0] * (4 - len(shape))] for shape in shapes], dtype=np.int32)
    np.savez_compressed(FILE, names=np.array(names), shapes=padded_shapes, images=images, features=features)
    print(
        f"{FILE.name}: {FILE.stat().st_size:,} bytes; features {features.shape}, deviation {features.std():.3f}"
    )


if __name__ == "__main__":
    main()
