"""Static quantization of an exported ONNX file to int8, by onnxruntime."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from nin.data.cache import MappedImages

CALIBRATION_IMAGES, BATCH_IMAGES = 512, 64


class _TrainingImages(CalibrationDataReader):
    """Batches of images from which the ranges of all activations are taken."""

    def __init__(self, images: np.ndarray):
        self.batches: Iterator[np.ndarray] = iter(np.split(images, range(BATCH_IMAGES, len(images), BATCH_IMAGES)))

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch}


def quantize(source: Path, path: Path, images: np.ndarray | MappedImages) -> None:
    """Writes ``source`` with its convolutions and fully connected layers in int8 to ``path``.

    Preprocessing, pooling to logits and softmax stay float32. Weights have one scale per output channel.

    Args:
        images: training images to calibrate with, ``(count, height, width)`` or ``(count, height, width, 3)`` uint8; at
            most 512 are used, at equal distances.
    """
    prepared = path.with_name(f"{path.stem}-prepared.onnx")
    count = min(CALIBRATION_IMAGES, len(images))
    # A folder's images are sorted by class: at equal distances there are some of each.
    chosen = images[np.arange(count) * len(images) // count]
    try:
        # Batch norm becomes part of the convolution before it, which is then quantized as one.
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(path),
            _TrainingImages(chosen),
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            # x86-64 without VNNI adds pairs of products in 16 bits: 7 bits of weights cannot overflow them.
            reduce_range=True,
            calibrate_method=CalibrationMethod.MinMax,
        )
    finally:
        prepared.unlink(missing_ok=True)
