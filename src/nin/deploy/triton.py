"""A model repository for NVIDIA Triton and KServe around an exported ONNX file."""

import json
import re
from pathlib import Path

from nin.config.errors import printable
from nin.config.schema import UserError
from nin.deploy.export import BATCH_IMAGES, Exporter, ExportError
from nin.deploy.trained import Description
from nin.runs.files import read_bytes, write_atomically

# The time that Triton waits for more images before it computes a batch that is not full.
QUEUE_MICROSECONDS = 500


def export_triton(exporter: Exporter, repository: Path) -> Path:
    """Writes ``<repository>/<run>/`` with config.pbtxt, labels.txt and ``1/model.onnx``; returns that folder.

    Raises:
        ExportError: if the ONNX file does not give what the checkpoint gives; nothing is written.
    """
    name = re.sub(r"\W+", "_", exporter.description.more["run"])
    folder = repository / name
    require_same_run(folder / "config.pbtxt", exporter.description.more["run"])
    try:
        description = exporter.export_onnx(folder / "1" / "model.onnx")
    except ExportError:
        for made in (folder / "1", folder, repository):
            if not any(made.iterdir()):
                made.rmdir()
        raise
    write_atomically(folder / "labels.txt", "".join(f"{printable(label)}\n" for label in description.class_names))
    map_size = exporter.map_size()
    write_atomically(folder / "config.pbtxt", _config(name, description, map_size))
    return folder


def require_same_run(config: Path, run: str) -> None:
    """Raises UserError if ``config`` is of another run, whose name differs in a character that Triton does not take."""
    if config.is_file() and _value("run", run).encode() not in read_bytes(config):
        raise UserError(f"{config.parent}: has another run than {printable(run)}; give another folder with --out")


def _value(key: str, value: object) -> str:
    return f'{{ key: "{key}" value: {{ string_value: {json.dumps(str(value))} }} }}'


def _config(name: str, description: Description, map_size: tuple[int, int] | None) -> str:
    """The text form of Triton's ModelConfig. Sizes exclude the batch; -1 is any."""
    classes = len(description.class_names)
    pixels = "[ -1, -1 ]" if description.channels == 1 else "[ -1, -1, 3 ]"
    maps = [("maps", f"[ {classes}, {map_size[0]}, {map_size[1]} ]", "")] if map_size else []
    outputs = ",\n".join(
        f'  {{ name: "{output}" data_type: TYPE_FP32 dims: {dims}{labels} }}'
        for output, dims, labels in (
            ("probabilities", f"[ {classes} ]", ' label_filename: "labels.txt"'),
            ("logits", f"[ {classes} ]", ""),
            *maps,
        )
    )
    about = ",\n".join(f"  {_value(key, description.more[key])}" for key in ("run", "weights_sha256"))
    return f"""\
name: "{name}"
backend: "onnxruntime"
max_batch_size: {BATCH_IMAGES}
input [
  {{ name: "images" data_type: TYPE_UINT8 dims: {pixels} }}
]
output [
{outputs}
]
dynamic_batching {{ max_queue_delay_microseconds: {QUEUE_MICROSECONDS} }}
parameters [
{about}
]
"""
