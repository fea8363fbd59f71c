"""An exported ONNX file, computed by onnxruntime. Imports no torch.

The file is data: nothing in its metadata is imported or called, weights outside of it are refused, and so are
operators that onnxruntime itself does not have.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from nin.config.errors import read_first_line
from nin.config.schema import Settings, UserError
from nin.config.validation import validate_plain
from nin.deploy.trained import Description, Scores, TrainedNetwork
from nin.runs.files import read_bytes

# onnxruntime (1.32, for one) sends telemetry to Microsoft, unless this variable is set when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# The key of an export's description in its metadata; other programs read the other keys.
METADATA_KEY = "nin"


def load_onnx(path: Path, threads: int | None = None) -> TrainedNetwork:
    """An export ready to classify images, on the CPU.

    Args:
        threads: of the CPU; None is all cores.

    Raises:
        UserError: if onnxruntime is missing, or the file is missing, damaged, or not written by `nin export`.
    """
    session = open_session(path, threads)
    description = read_description(session.get_modelmeta().custom_metadata_map, path)
    outputs = [output.name for output in session.get_outputs()]

    def compute(images: np.ndarray, maps: bool) -> Scores:
        names = ["probabilities", "logits", *(["maps"] if maps else [])]
        return Scores(*session.run(names, {"images": images}))

    if session.get_inputs()[0].name != "images" or outputs[:2] != ["probabilities", "logits"]:
        raise UserError(f"{path}: not written by nin export: its outputs are {', '.join(outputs)}")
    if session.get_outputs()[0].shape[1:] != [classes := len(description.class_names)]:
        raise UserError(f"{path}: not written by nin export: it names {classes} classes, which is not what it computes")
    if "maps" not in outputs:
        description = dataclasses.replace(description, maps="none")
    return TrainedNetwork(description, compute)


def open_session(path: Path, threads: int | None = None) -> Any:
    """An onnxruntime session of a file that must hold everything itself.

    Raises:
        UserError: if onnxruntime is missing, or the file is missing, damaged or not self-contained.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"{path}: needs onnxruntime: python3 -m pip install onnxruntime") from None
    try:
        content = read_bytes(path)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised, and need no log
    options.intra_op_num_threads = threads or 0
    # Between two batches the threads sleep; the server's other work needs the cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # A file that refers to weights in other files would have onnxruntime read any file of this machine: in this folder
    # there is none.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    # onnxruntime's exceptions share no base class but Exception.
    except Exception as error:
        reason = read_first_line(error)[:300]
        raise UserError(f"{path}: refused: damaged, or not a self-contained ONNX file ({reason})") from error


def read_description(metadata: dict[str, str], path: Path) -> Description:
    """The description that `nin export` wrote into a file's metadata.

    Raises:
        UserError: if there is none, or it is not what this version writes.
    """
    try:
        description = TypeAdapter(Description).validate_json(metadata[METADATA_KEY])
        are_unique = len(set(description.class_names)) == len(description.class_names)
        if are_unique and description.channels in (1, 3) and isinstance(description.settings["data"], dict):
            return description
    except (KeyError, ValidationError):
        pass
    raise UserError(f"{path}: not written by this version of nin export: its metadata has no description of a run")


def metadata_of(description: Description) -> dict[str, str]:
    """A file's metadata: the description as JSON, and its main entries each for programs that know nothing of nin."""
    more = {key: value for key, value in description.more.items() if value is not None}
    plain = {key: value if isinstance(value, str) else json.dumps(value) for key, value in more.items()}
    return {
        # Programs may show it as it is.
        "class_names": json.dumps(description.class_names, ensure_ascii=False),
        **plain,
        METADATA_KEY: json.dumps(dataclasses.asdict(description)),
    }


def read_export_settings(description: Description, path: Path) -> Settings:
    """The settings of the run that an export was made of.

    Raises:
        UserError: if they are not what this version of the project knows.
    """
    try:
        return validate_plain(description.settings)
    except UserError as error:
        raise UserError(f"{path}: written by another version of nin?\n{error}") from error
