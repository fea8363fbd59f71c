"""Files and small folders of generated images."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nin.config.schema import FolderData

COLORS = {"blue": (20, 40, 220), "green": (30, 200, 60), "red": (220, 30, 40)}


def write_folder(root: Path, counts: Mapping[str, int], classes: Mapping[str, object] = COLORS, size: int = 12) -> Path:
    """Writes noisy images of one color per class: ``root/<part>/<class>/0.png``, …"""
    random = np.random.default_rng(0)
    for part, count in counts.items():
        for name, color in classes.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.broadcast_to(np.array(color), (size, size, 3)) + random.integers(-20, 20, (size, size, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return root


def encode(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    """The content of an image's file."""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def folder_data(root: Path, **keys: object) -> FolderData:
    values = {
        "name": "folder", "root": str(root), "image_size": 12, "batch_size": 2, "score_each_epoch": "val",
        "augment": "none", "normalize": False, "test_time_flip": False, "val_size": 0.25, "test_size": 0.25,
        "stored_size": 12, "fit": "crop", "channels": "auto", "skip_broken": False, "cache": None,
        "memory_limit_mib": 100,
    }  # fmt: skip
    return FolderData.model_validate(values | keys)
