"""Exports for PyTorch without this project: torch.export for Python, an AOTInductor package for C++."""

import contextlib
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._inductor import aoti_compile_and_package, aoti_load_package
from torch.export import Dim

from nin.config.schema import UserError
from nin.deploy.export import Exporter, example_images, open_checked
from nin.deploy.onnx_model import METADATA_KEY, metadata_of
from nin.deploy.pipeline import Pipeline
from nin.deploy.trained import Description, Scores, TrainedNetwork


def export_pt2(exporter: Exporter, path: Path) -> list[tuple[Path, str]]:
    """Writes the AOTInductor package ``path`` and, beside it, the ``torch.export`` program that it was compiled from.

    Both are checked on the whole test set before they are kept. The package holds compiled code of this machine's
    kind of processor: unlike an ONNX file, load one only from a source that you would run a program from.

    Returns:
        The files, each with a line that describes it.

    Raises:
        ExportError: if probabilities or predictions differ from the checkpoint's; that file is not written.
        UserError: if there is no C++ compiler.
    """
    if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        raise UserError("--format pt2: AOTInductor needs a C++ compiler; install g++ or clang++")
    program = trace_program(exporter.pipeline)
    exported, description = path.with_suffix(".export.pt2"), exporter.description
    with open_checked(exported) as temporary:
        _save_program(program, temporary, description)
        found = exporter.check(_trained(exporter, torch.export.load(temporary).module()))
        _save_program(program, temporary, description.with_more(check=found))
    with open_checked(path) as temporary:
        # The metadata is compiled in, before the package can be checked: it has the check of its program.
        _compile_package(program, temporary, description.with_more(check_of_program=found))
        found_of_package = exporter.check(_trained(exporter, aoti_load_package(str(temporary))))
    return [
        (exported, _describe(found, "torch.export.load() in Python")),
        (path, _describe(found_of_package, "torch::inductor::AOTIModelPackageLoader in C++")),
    ]


def trace_program(pipeline: Pipeline) -> torch.export.ExportedProgram:
    """The pipeline as a program with dynamic batch, height and width."""
    sizes = {0: Dim("batch"), 1: Dim("height"), 2: Dim("width")}
    try:
        return torch.export.export(pipeline, example_images(pipeline), dynamic_shapes=(sizes,), strict=False)
    # The errors are of many types. TorchDynamo follows Python code that the trace takes for constants, as len(images)
    # in a network of the user's own; torch.onnx.export tries both too.
    except Exception:  # noqa: BLE001
        return torch.export.export(pipeline, example_images(pipeline), dynamic_shapes=(sizes,), strict=True)


def _describe(found: dict[str, Any], how_to_load: str) -> str:
    return f"{found['images']:,} test images classified as by the checkpoint; {how_to_load}"


def _save_program(program: torch.export.ExportedProgram, path: Path, description: Description) -> None:
    with _channels_last_weights():
        torch.export.save(program, path, extra_files={f"{METADATA_KEY}.json": metadata_of(description)[METADATA_KEY]})


def _compile_package(program: torch.export.ExportedProgram, path: Path, description: Description) -> None:
    metadata = {key: value for key, value in metadata_of(description).items() if key != METADATA_KEY}
    torch_log = logging.getLogger("torch")
    level = torch_log.level
    torch_log.setLevel(logging.ERROR)  # it warns of what this machine lacks; errors are raised
    try:
        with _channels_last_weights():
            aoti_compile_and_package(
                program, package_path=str(path), inductor_configs={"aot_inductor.metadata": metadata}
            )
    finally:
        torch_log.setLevel(level)


@contextlib.contextmanager
def _channels_last_weights() -> Iterator[None]:
    """Hides torch's warning that channels-last weights are views of no complete tensor: on the CPU it has no effect."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")
        yield


def _trained(exporter: Exporter, module: Any) -> TrainedNetwork:
    def compute(images: np.ndarray, maps: bool) -> Scores:
        with torch.no_grad():
            return Scores(*(output.numpy() for output in module(torch.tensor(images))[:2]))

    return TrainedNetwork(exporter.description, compute)
