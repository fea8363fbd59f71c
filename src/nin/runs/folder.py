"""A run is a folder: the names of its files, whose it is, and writes that are whole or not there at all."""

import contextlib
import csv
import json
import logging
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from nin.config.schema import UserError


class RunFolder:
    """The files of one run; ``outputs/runs/<name>/`` or a sweep's ``outputs/sweeps/<name>/<overrides>/``.

    Args:
        keep: how many checkpoints before ``last.ckpt`` stay to fall back on.
    """

    def __init__(self, path: str | Path, keep: int = 2):
        self.path, self.keep = Path(path), keep
        self.config = self.path / ".hydra" / "config.yaml"
        self.overrides = self.path / ".hydra" / "overrides.yaml"
        self.owner = self.path / ".hydra" / "process.json"
        self.checkpoints = self.path / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"
        self.best = self.checkpoints / "best.ckpt"
        self.fresh = self.checkpoints / ".fresh.ckpt"  # on its way to become last.ckpt
        self.tensorboard = self.path / "tensorboard"
        self.metrics = self.path / "metrics.csv"
        self.log = self.path / "nin.log"
        self.result = self.path / "result.json"

    @contextlib.contextmanager
    def claimed(self, patience: float = 0) -> Iterator[None]:
        """This process owns the folder meanwhile; the claim of a process that was killed ends with it.

        Args:
            patience: seconds to wait for another process to be done with it.

        Raises:
            UserError: if another process has it, or it can't be written.
        """
        try:
            self.config.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".hydra" / "lock", timeout=patience)
            lock.acquire()
        except Timeout:
            owner = self._read_owner()
            raise UserError(
                f"{self.path}: process {owner.get('pid')} on {owner.get('host')} is at work on this run; wait for it, "
                "stop it, or give another name=…"
            ) from None
        except OSError as error:
            raise UserError(
                f"{self.path}: can't be written ({error.strerror}); make it so, or give another name"
            ) from error
        try:
            write_atomically(
                self.owner, json.dumps(self._read_owner() | {"pid": os.getpid(), "host": socket.gethostname()})
            )
            for half_written in (*self.path.glob(".*.tmp"), *self.checkpoints.glob(".*.tmp"), self.fresh):
                half_written.unlink(missing_ok=True)
            yield
        finally:
            with contextlib.suppress(OSError):
                owner = {k: v for k, v in self._read_owner().items() if k not in ("pid", "host")}
                write_atomically(self.owner, json.dumps(owner))
            lock.release()
            if not self.config.exists():  # refused before anything was asked of it
                shutil.rmtree(self.config.parent, ignore_errors=True)

    def is_claimed(self) -> bool:
        """Whether the process that last had this folder lives, as far as this machine can tell."""
        # Not by the lock: to try it is to have it for a moment, and a job that begins just then would be refused.
        owner = self._read_owner()
        if owner.get("host") != socket.gethostname():
            return False
        try:
            os.kill(owner["pid"], 0)
        except PermissionError:
            return True
        except OSError:
            return False
        return True

    def latest_scores(self) -> dict[str, float]:
        """The last epoch's scores of a run that has not ended, from metrics.csv."""
        rows = self.read_epochs()
        return {k: v for k, v in rows[-1].items() if k.startswith(("val/", "test/"))} if rows else {}

    def read_epochs(self) -> list[dict[str, float]]:
        """The rows of metrics.csv, one an epoch; an epoch without scores has no such keys."""
        with contextlib.suppress(OSError):
            rows = csv.DictReader(self.metrics.read_text().splitlines())
            return [{k: float(v) for k, v in row.items() if v} for row in rows]
        return []

    def _read_owner(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            return json.loads(self.owner.read_text())
        return {}

    def resumes(self, one_more: bool = False) -> int:
        """How often training went on from a checkpoint; counted here, since a checkpoint can't know what came later."""
        owner = self._read_owner()
        if one_more:
            owner["resumes"] = owner.get("resumes", 0) + 1
            write_atomically(self.owner, json.dumps(owner))
        return owner.get("resumes", 0)

    def write_request(self, config: DictConfig, overrides: list[str]) -> None:
        """Writes down what was asked: the compose_config config, and the overrides that led to it."""
        write_atomically(self.overrides, OmegaConf.to_yaml(OmegaConf.create(overrides)))
        write_atomically(self.config, OmegaConf.to_yaml(config, resolve=True))

    def read_request(self) -> DictConfig | None:
        """The config of the run that this folder belongs to, or None if it is new.

        Raises:
            UserError: if the file is there and is no config.
        """
        if not self.config.exists():
            return None
        try:
            config = OmegaConf.load(self.config)
        except (OSError, YAMLError) as error:
            raise UserError(f"{self.config}: can't be read ({str(error).splitlines()[0]})") from error
        if not isinstance(config, DictConfig) or not config:
            raise UserError(f"{self.config}: not a run's config; remove the run's folder, or give another name=…")
        return config

    def has_progress(self) -> bool:
        """Whether there is anything of a run here that another experiment must not take for its own."""
        return self.result_status() == "finished" or any(self.checkpoints.glob("[!.]*"))

    def result_status(self) -> str | None:
        return (self.read_result() or {}).get("status")

    def read_result(self) -> dict[str, Any] | None:
        """What the run ended with, finished or failed, or None if it has not ended."""
        with contextlib.suppress(OSError, ValueError):  # none yet, or not by us: we write it whole
            return json.loads(self.result.read_text())
        return None

    def write_result(self, result: dict[str, Any]) -> None:
        write_atomically(self.result, json.dumps(result, indent=2) + "\n")

    def resume_candidates(self) -> list[Path]:
        """Where a checkpoint to go on from may be, the newest first."""
        older = (p for p in self.checkpoints.glob("last-*.ckpt") if p.stem.removeprefix("last-").isdigit())
        # A run that was killed while it saved for the first time has nothing but its best.
        return [self.last, *sorted(older, key=lambda p: int(p.stem.removeprefix("last-"))), self.best]

    def publish(self, best: bool) -> None:
        """``fresh`` becomes last.ckpt, and best.ckpt as well if it is; the last ones before it move down by one."""
        if best:
            with self.fresh.open("rb") as content, open_atomically(self.best) as file:
                shutil.copyfileobj(content, file)
        if self.keep and self.last.exists():
            for i in reversed(range(1, self.keep)):
                if (older := self.last.with_name(f"last-{i}.ckpt")).exists():
                    older.replace(self.last.with_name(f"last-{i + 1}.ckpt"))
            self.last.replace(self.last.with_name("last-1.ckpt"))
        self.fresh.replace(self.last)
        _flush_names(self.checkpoints)

    def event_file_sizes(self) -> dict[str, int]:
        """How many bytes of each TensorBoard event file there are."""
        return {p.name: p.stat().st_size for p in self.tensorboard.glob("events.*")}

    def truncate_event_files(self, sizes: dict[str, int]) -> None:
        """Takes away what was written after ``sizes`` were noted: a process that died wrote it, and it comes again."""
        for path in self.tensorboard.glob("events.*"):
            if path.name not in sizes:
                path.unlink()
            elif path.stat().st_size > sizes[path.name]:
                os.truncate(path, sizes[path.name])


def write_atomically(path: Path, text: str) -> None:
    """Writes ``text`` to ``path``, whole or not at all."""
    with open_atomically(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the name ``path`` at the end: in the same folder, flushed to disk, renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_names(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush_names(folder: Path) -> None:
    """A rename, too, is on disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Console(logging.StreamHandler):
    """Prints to what is standard error at that moment: a bar on a terminal puts its own in the place of it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


@contextlib.contextmanager
def logging_to(file: Path | None, label: str = "") -> Iterator[None]:
    """Everything that is logged, warnings included, goes to ``file``; warnings and errors also to standard error.

    Args:
        label: stands before every line there, where other runs print beside this one.
    """
    console = _Console()
    console.setLevel(logging.WARNING)
    console.setFormatter(logging.Formatter(f"{label}%(levelname)s: %(message)s"))
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
