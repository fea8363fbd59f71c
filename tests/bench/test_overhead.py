from pathlib import Path

import pytest

from nin.bench import overhead
from nin.commands.bench import compose_bench_settings
from pictures import write_folder


@pytest.mark.parametrize("init", ["kaiming_normal", "kaiming_dirac_pca"])  # the latter is that of experiment=cpu
def test_color_images_of_any_number_of_classes_are_measured(
    init: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overhead, "_STEPS", 3)
    monkeypatch.setattr(overhead, "_WARM_UP", 1)
    root = write_folder(tmp_path / "root", {"train": 9})  # fewer than a batch of the measurement
    words = ["data=folder", f"data.root={root}", "model=nin_small", "model.widths=[4,8]", "data.batch_size=4"]
    words.append(f"model.init={init}")
    milliseconds = overhead.measure_overhead(
        compose_bench_settings([*words, "trainer=cpu", "trainer.log_every_n_steps=1"]), 1, lambda *_: None
    )
    assert set(milliseconds) == {"plain loop", "bare Trainer", "nin train"}
    assert min(milliseconds.values()) > 0
