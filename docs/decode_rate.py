"""The rate at which data=folder decodes images, compared with a plain loop of Pillow on one core, alternating.

    python docs/decode_rate.py FOLDER [TURNS]

FOLDER holds train/<class>/ and may hold val/<class>/ and test/<class>/. Nothing is written in or beside it. The rate of
data=folder includes all that a first start does: the folder is listed twice and checked, processes are started, and the
pixels are written to disk and hashed. The plain loop decodes only, from a list of names that is there already.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from nin.config.schema import FolderData
from nin.data.cache import open_cache


def decode_in_a_loop(files: list[str]) -> float:
    """Seconds in which this process decodes ``files``."""
    start = time.perf_counter()
    for file in files:
        Image.open(file).convert("RGB")
    return time.perf_counter() - start


def decode_as_data_folder(root: Path, size: int) -> tuple[float, float]:
    """Seconds of a first start, and of a second one, which decodes nothing."""
    with tempfile.TemporaryDirectory() as cache:
        data = FolderData(
            name="folder", root=str(root), image_size=size, batch_size=1, score_each_epoch="test", augment="none",
            normalize=False, test_time_flip=False, val_size=0, test_size=0, stored_size=size, fit="crop",
            channels="auto", skip_broken=False, cache=cache, memory_limit_mib=0,
        )  # fmt: skip
        start = time.perf_counter()
        open_cache(data)
        first = time.perf_counter()
        open_cache(data)
        return first - start, time.perf_counter() - first


if __name__ == "__main__":
    root, turns = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3
    files = sorted(str(path) for part in ("train", "val", "test") for path in (root / part).rglob("*.*"))
    size = min(Image.open(files[0]).size)
    print(f"{len(files):,} images, {len(os.sched_getaffinity(0))} cores")
    for _ in range(turns):
        loop, (first, second) = decode_in_a_loop(files), decode_as_data_folder(root, size)
        print(
            f"plain loop {len(files) / loop:,.0f} images/s, data=folder {len(files) / first:,.0f} images/s, "
            f"ratio {loop / first:.2f}; second start {second:.2f} s",
            flush=True,
        )
