"""Exports for PyTorch without this project: torch.export for Python, an AOTInductor package for C++."""

import contextlib
import dataclasses
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
from nin.deploy.export import Exporter, example_images
from nin.deploy.onnx_model import METADATA_KEY, metadata_of
from nin.deploy.trained import Scores, TrainedNetwork


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
    sizes = {0: Dim("batch"), 1: Dim("height"), 2: Dim("width")}
    program = torch.export.export(exporter.pipeline, example_images(exporter.pipeline), dynamic_shapes=(sizes,))
    exported, description = path.with_suffix(".export.pt2"), exporter.description
    written = []
    for file, what, save, load in (
        (exported, "torch.export.load() in Python", _save_program, _load_program),
        (path, "torch::inductor::AOTIModelPackageLoader in C++", _compile_package, aoti_load_package),
    ):
        temporary = file.with_name(f"tmp-{file.name}")
        try:
            save(program, temporary, metadata_of(description))
            found = exporter.check(_trained(exporter, load(str(temporary))))
            if file == exported:
                described = dataclasses.replace(description, more=description.more | {"check": found})
                save(program, temporary, metadata_of(described))
                # Of the package itself the check is known only when it is compiled: it has that of its program.
                description = dataclasses.replace(description, more=description.more | {"check_of_program": found})
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
        written.append((file, f"{found['images']:,} test images classified as by the checkpoint; {what}"))
    return written


def _save_program(program: torch.export.ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    with _channels_last_weights():
        torch.export.save(program, path, extra_files={f"{METADATA_KEY}.json": metadata[METADATA_KEY]})


def _load_program(path: str) -> Any:
    return torch.export.load(path).module()


def _compile_package(program: torch.export.ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    plain = {key: value for key, value in metadata.items() if key != METADATA_KEY}
    torch_log = logging.getLogger("torch")
    level = torch_log.level
    torch_log.setLevel(logging.ERROR)  # its warnings are of what this machine lacks; errors are raised
    try:
        with _channels_last_weights():
            aoti_compile_and_package(program, package_path=str(path), inductor_configs={"aot_inductor.metadata": plain})
    finally:
        torch_log.setLevel(level)


@contextlib.contextmanager
def _channels_last_weights() -> Iterator[None]:
    """torch warns that weights in the channels-last layout are views of no complete tensor; on the CPU all is well."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")
        yield


def _trained(exporter: Exporter, module: Any) -> TrainedNetwork:
    def compute(images: np.ndarray, maps: bool) -> Scores:
        with torch.no_grad():
            return Scores(*(output.numpy() for output in module(torch.tensor(images))[:2]))

    return TrainedNetwork(dataclasses.replace(exporter.description), compute)
