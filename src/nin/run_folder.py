"""A run is a folder: the names of its files, and writes that are whole or not there at all."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf


class RunFolder:
    """The files of one run; ``outputs/runs/<name>/`` or a sweep's ``outputs/sweeps/<name>/<overrides>/``."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / ".hydra" / "config.yaml"
        self.overrides = self.path / ".hydra" / "overrides.yaml"
        self.checkpoints = self.path / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"
        self.best = self.checkpoints / "best.ckpt"
        self.tensorboard = self.path / "tensorboard"
        self.metrics = self.path / "metrics.csv"
        self.log = self.path / "nin.log"
        self.result = self.path / "result.json"

    def write_asked(self, config: DictConfig, overrides: list[str]) -> None:
        """Writes down what was asked: the composed config, and the overrides that led to it."""
        self.config.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.config, OmegaConf.to_yaml(config, resolve=True))
        write_whole(self.overrides, OmegaConf.to_yaml(OmegaConf.create(overrides)))

    def is_finished(self) -> bool:
        return (self.read_result() or {}).get("status") == "finished"

    def read_result(self) -> dict[str, Any] | None:
        """What the run ended with, finished or failed, or None if it has not ended."""
        return json.loads(self.result.read_text()) if self.result.exists() else None

    def write_result(self, result: dict[str, Any]) -> None:
        write_whole(self.result, json.dumps(result, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes under a temporary name in the same folder, flushes to disk and renames: never half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def logging_to(file: Path | None) -> Iterator[None]:
    """Everything that is logged, warnings included, goes to ``file``; warnings and errors also to standard error."""
    console = logging.StreamHandler()
    console.setLevel(logging.WARNING)
    console.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    handlers: list[logging.Handler] = [console]
    if file:
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
        handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    before = root.handlers, root.level
    root.handlers = handlers
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.handlers, root.level = before
        for handler in handlers:
            handler.close()
