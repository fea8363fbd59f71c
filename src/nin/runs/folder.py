"""A run is a folder: the names of its files, what may be in it, and which process has claimed it."""

import contextlib
import csv
import errno
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nin.config.errors import read_first_line
from nin.config.schema import MachineError, UserError
from nin.runs.files import read_text, read_yaml_text, require_no_link, write_atomically

_TEMPORARY = f".*.{'[0-9a-f]' * 12}.tmp"  # the names that `open_atomically` gives
# The errors of a YAML file with other content. RecursionError: lists in lists, or one that holds itself.
_UNREADABLE = (OSError, YAMLError, ValueError, OmegaConfBaseException, RecursionError)

STATUSES = ("finished", "failed", "pruned")
_MAX_NAME_BYTES = 100  # the longest name of a folder; file systems allow 255
# The keys of state.json, each with the type of its value.
_STATE: dict[str, type] = {
    "pid": int, "host": str, "run_id": str, "starts": list, "resumes": int, "weights": str,
    "options": list,
}  # fmt: skip


class RunClaimedError(UserError):
    """Another process has claimed the run's folder."""


class RunFolder:
    """The files of one run; ``outputs/runs/<name>/`` or a sweep's ``outputs/sweeps/<name>/<overrides>/``.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / ".hydra" / "config.yaml"
        self.overrides = self.path / ".hydra" / "overrides.yaml"
        self.state = self.path / ".hydra" / "state.json"
        self.checkpoints = self.path / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"
        self.best = self.checkpoints / "best.ckpt"
        self.fresh = self.checkpoints / ".fresh.ckpt"  # just saved; `rotate_checkpoints` renames it
        self.metrics = self.path / "metrics.csv"
        self.log = self.path / "nin.log"
        self.result = self.path / "result.json"

    @contextlib.contextmanager
    def claim(self, wait: Callable[[str], None] | None = None) -> Iterator[None]:
        """Claims the folder for this process; the claim of a process that was killed ends with that process.

        What the context creates in a new folder is removed if it ends with a UserError before a request is written.

        Args:
            wait: called about once a second, with a description of the process that has the claim, until the folder
                is free; it may raise to stop waiting. None does not wait.

        Raises:
            RunClaimedError: if another process has claimed the folder and ``wait`` is None.
            MachineError: if the folder can't be written.
            UserError: if it holds anything else in the place of a run's files.
        """
        created = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        lock = FileLock(self.path / ".hydra" / "lock", timeout=1 if wait else 0)
        try:
            self._require_regular_files()
            self.config.parent.mkdir(parents=True, exist_ok=True)
            self._acquire(lock, wait)
        except OSError as error:
            raise self._cannot_write(error) from error
        try:
            try:
                self.update_state(pid=os.getpid(), host=socket.gethostname())
            except OSError as error:  # the disk is full
                raise self._cannot_write(error) from error
            written = (folder.glob(_TEMPORARY) for folder in (self.path, self.config.parent, self.checkpoints))
            for leftover in (*itertools.chain(*written), self.fresh):
                leftover.unlink(missing_ok=True)  # a process that was killed was writing it
            yield
        finally:
            with contextlib.suppress(OSError):
                if self.config.exists():
                    self.update_state(pid=None, host=None)
                else:  # refused before anything was requested; removed while the lock is held, which waiters notice
                    shutil.rmtree(self.config.parent)
                    for folder in created:
                        folder.rmdir()
            lock.release()

    def _cannot_write(self, error: OSError) -> MachineError:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if is_full else "change its permissions, or give another name"
        return MachineError(f"{self.path}: can't be written ({error.strerror}); {remedy}")

    def _acquire(self, lock: FileLock, wait: Callable[[str], None] | None) -> None:
        while True:
            try:
                lock.acquire()
                return
            except Timeout:
                state = self.read_state()
                owner = f"process {state.get('pid')} on {state.get('host')}"
                if wait is None:
                    raise RunClaimedError(
                        f"{self.path}: {owner} is working on this run; wait for it, stop it, or give another name=…"
                    ) from None
                wait(f"{self.path}: waiting for {owner}, which is working on this run")

    def _require_regular_files(self) -> None:
        """Checks that nothing is a pipe, a device or a link that would be written through; a logger may make others."""
        patterns = (".hydra/*", "**/hparams.yaml", "*/metrics.csv", ".*.tmp", "*/.*.tmp", "*/last-*.ckpt")
        written = {path for pattern in patterns for path in self.path.glob(pattern)}
        written |= {self.log, self.metrics, self.result, self.best, self.fresh, *self.event_files()}
        for path in self.path.rglob("*"):
            is_own = path in written or {path, path.parent} & {self.config.parent, self.checkpoints}
            leads_out = not Path(os.path.realpath(path)).is_relative_to(self.path.resolve())
            if is_own or leads_out:
                require_no_link(path)
            try:
                mode = path.stat().st_mode  # called once: another process may remove the file in the meantime
            except FileNotFoundError:
                continue
            if path in (self.config.parent, self.checkpoints) and not stat.S_ISDIR(mode):
                raise UserError(f"{path}: not a folder; remove it")
            if not stat.S_ISREG(mode) and (path in written or not stat.S_ISDIR(mode)):
                raise UserError(f"{path}: not a file; remove it")

    def read_state(self) -> dict[str, Any]:
        """The run's identity, the process that has claimed it, and each start: what no checkpoint can know."""
        with contextlib.suppress(OSError, ValueError, RecursionError):
            state = json.loads(read_text(self.state))
            if isinstance(state, dict):
                return {key: value for key, value in state.items() if isinstance(value, _STATE.get(key, ()))}
        return {}

    def update_state(self, **values: Any) -> None:
        """Sets ``values`` in the state (None removes a key) and writes it atomically."""
        state = {key: value for key, value in (self.read_state() | values).items() if value is not None}
        write_atomically(self.state, json.dumps(state))

    def write_request(self, config: dict[str, Any], overrides: list[str]) -> None:
        """Writes the requested config and the overrides that led to it."""
        write_atomically(self.overrides, OmegaConf.to_yaml(OmegaConf.create(overrides)))
        write_atomically(self.config, OmegaConf.to_yaml(OmegaConf.create(config)))

    def read_request(self) -> dict[Any, Any] | None:
        """The config of the run in this folder, in plain values; None if the folder is new.

        Raises:
            UserError: if the file is there and is not a config.
        """
        config = _read_yaml(self.config)
        if config is not None and not (isinstance(config, dict) and config):
            raise UserError(f"{self.config}: not a run's config; remove the run's folder, or give another name=…")
        return config

    def read_overrides(self) -> list[str]:
        """The overrides of the run in this folder; none if the file is missing.

        Raises:
            UserError: if the file is not a list of overrides.
        """
        overrides = _read_yaml(self.overrides)
        if overrides is None:
            return []
        if not isinstance(overrides, list) or not all(isinstance(word, str) for word in overrides):
            raise UserError(f"{self.overrides}: not a list of overrides (key=value); remove the file")
        return overrides

    def has_progress(self) -> bool:
        """Whether the folder holds a result or checkpoints, which another experiment must not replace."""
        return self.result_status() == "finished" or any(self.checkpoints.glob("[!.]*"))

    def result_status(self) -> str | None:
        """ "finished", "failed" or "pruned"; None if the run has not ended."""
        return (self.read_result() or {}).get("status")

    def read_result(self) -> dict[str, Any] | None:
        """The content of ``result.json``, or None if the run has not ended.

        Raises:
            UserError: if the file is not a result.
        """
        try:
            result = json.loads(read_text(self.result))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError):
            result = None
        is_result = isinstance(result, dict) and isinstance(result.get("metrics", {}), dict)
        if not is_result or result.get("status") not in STATUSES:
            raise UserError(f"{self.result}: not the result of a run; remove it and run the command again")
        return result

    def find_result(self) -> dict[str, Any]:
        """As `read_result`, but empty if the run has not ended or the file is damaged: a new start writes it again."""
        with contextlib.suppress(UserError):
            return self.read_result() or {}
        return {}

    def write_result(self, result: dict[str, Any]) -> None:
        """Writes ``result.json`` atomically."""
        write_atomically(self.result, json.dumps(result, indent=2) + "\n")

    def read_epochs(self) -> list[dict[str, float]]:
        """The rows of ``metrics.csv``, one per epoch; an epoch without validation lacks its metrics.

        There are none if the file is missing or has other content.
        """
        with contextlib.suppress(OSError, ValueError, TypeError, csv.Error):
            rows = csv.DictReader(read_text(self.metrics).splitlines())
            return [{k: float(v) for k, v in row.items() if v} for row in rows]
        return []

    def event_files(self) -> list[Path]:
        """TensorBoard's event files. They are in the run's folder itself, whose name TensorBoard shows."""
        return list(self.path.glob("events.out.tfevents.*"))

    def event_file_sizes(self) -> dict[str, int]:
        """The size of each TensorBoard event file, in bytes."""
        return {path.name: path.stat().st_size for path in self.event_files()}

    def truncate_event_files(self, sizes: dict[str, int]) -> list[str]:
        """Cuts event files to ``sizes``: a process that died wrote what follows, and it is written again.

        Returns the names of the files that are missing or shorter than ``sizes`` says.
        """
        for path in self.event_files():
            if path.name not in sizes:
                path.unlink()
            elif path.stat().st_size > sizes[path.name]:
                os.truncate(path, sizes[path.name])
        there = self.event_file_sizes()
        return [name for name, size in sizes.items() if there.get(name, 0) < size]


def find_weights_file(given: Path) -> Path:
    """The checkpoint that the key ``weights`` names: best.ckpt of a run's folder, or the file itself.

    Raises:
        MachineError: if there is none.
    """
    path = RunFolder(given).best if given.is_dir() else given
    if not path.is_file():
        raise MachineError(f"weights={given}: {'has no checkpoints/best.ckpt' if given.is_dir() else 'no such file'}")
    return path


def _read_yaml(path: Path) -> Any:
    """The plain values in a YAML file, with no interpolation resolved; None if the file is missing.

    Raises:
        UserError: if it can't be read.
    """
    if not path.exists():
        return None
    try:
        return OmegaConf.to_container(OmegaConf.load(io.StringIO(read_yaml_text(path))))
    except _UNREADABLE as error:
        raise UserError(f"{path}: can't be read ({read_first_line(error)})") from error


def job_folder(overrides: str) -> str:
    """The name of a run's folder from overrides: those that a sweep varies, as in ``optimizer.lr=0.1,seed=0``.

    A single run of an experiment with changes has the experiment's name in front. A name that is too long or has
    characters that a folder's name should not have is shortened and ends with a part of its checksum: two runs with
    different overrides never share a folder.
    """
    if not overrides:
        return "job"  # the sweep varies nothing
    plain = re.sub(r"[^\w=.,+@-]+", "_", overrides)
    encoded = plain.encode()
    if plain == overrides and len(encoded) <= _MAX_NAME_BYTES:
        return plain
    start = encoded[: _MAX_NAME_BYTES - 9].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"
