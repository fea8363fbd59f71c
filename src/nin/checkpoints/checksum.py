"""The checksum that every checkpoint file ends with. Imports no torch."""

from pathlib import Path

# The comment of the zip file: 64 hexadecimal digits of the SHA-256 of everything before them.
DIGITS = 64


def read_checksum(path: Path) -> str | None:
    """The checksum in a checkpoint file, which is not compared with its content; None if ``path`` is no file.

    Raises:
        OSError: if the file can't be read.
    """
    if not path.is_file():  # reading a named pipe would wait for its writer
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - DIGITS))
        return file.read(DIGITS).decode(errors="replace")
