"""Reading of files that may come from elsewhere, and atomic writing."""

import contextlib
import errno
import glob
import os
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import yaml

from nin.config.schema import UserError

_LEFT_OVER_SECONDS = 3600  # nobody writes a file for that long without a byte in between
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def require_no_link(path: Path) -> None:
    """Raises UserError if ``path`` is a symbolic link: in a folder from elsewhere it may lead to any file."""
    if path.is_symlink():
        raise UserError(f"{path}: a symbolic link, which would be written through; replace it by its target")


def read_bytes(path: Path) -> bytes:
    """The content of a file; raises OSError for a pipe or a device, of which ``Path.read_bytes`` would find no end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a file", str(path))
    return path.read_bytes()


def read_text(path: Path) -> str:
    """The text of a file, as `read_bytes` reads it; raises UnicodeDecodeError, a ValueError, if it is no text."""
    return read_bytes(path).decode()


def read_yaml_text(path: Path) -> str:
    """The text of a YAML file in which no value refers to another one.

    Raises:
        OSError, ValueError, yaml.YAMLError, RecursionError: if it can't be read, or a value refers to another one: a
            few such lines can stand for more than fits in memory.
    """
    text = read_text(path)
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=YAML_LOADER)):
        raise ValueError("a value refers to another one, by *")
    return text


def write_atomically(path: Path, text: str) -> None:
    """Writes ``text`` to ``path`` atomically."""
    with open_atomically(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file in the same folder; on exit it is flushed to disk and renamed to ``path``.

    Several processes may do so at the same time: the last one to end is the one whose content stays. A symbolic link at
    ``path`` is replaced, not followed.

    Raises:
        OSError: if it can't be written, or there is a folder, a device or a pipe, or a link to one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # a device or a pipe, which must not become a file
        raise OSError(errno.EINVAL, "not a file", str(path))
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):  # another process may remove it in the meantime
            if time.time() - leftover.lstat().st_mtime > _LEFT_OVER_SECONDS:  # left by a killed process
                leftover.unlink()
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        if error.filename == str(temporary):  # for messages, the file that is to be written
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flushes a folder's entries to disk: until then a rename may be lost in a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # some file systems can't flush folders
            raise
    finally:
        os.close(descriptor)
