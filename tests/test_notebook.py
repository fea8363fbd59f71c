"""docs/nin.ipynb runs from top to bottom."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from helpers import SMALL

NOTEBOOK = Path(__file__).parents[1] / "docs" / "nin.ipynb"
OVERRIDES = 'overrides = ["experiment=quickstart", "data.root=../data"]'


@pytest.mark.long
# Of jupyter_client and its event loop, when the kernel is shut down.
@pytest.mark.filterwarnings("default")
def test_the_notebook_trains_and_loads_the_best_checkpoint(data_root: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (training,) = [cell for cell in notebook.cells if OVERRIDES in cell.source]
    small = [word for word in SMALL if "limit_test_batches" not in word]  # the notebook tests all images too
    cheap = [*small, "callbacks=none", "logger=none", f"data.root={data_root}"]
    training.source = training.source.replace(OVERRIDES, f"overrides = {cheap!r}")
    (tmp_path / "docs").mkdir()
    resources = {"metadata": {"path": str(tmp_path / "docs")}}
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources=resources).execute()

    printed = "\n".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "1,992,166 parameters" in printed
    # After twelve steps some classes may never be predicted.
    assert "WARNING" not in printed.replace("WARNING: never predicted", "")
    # The accuracy of the loaded checkpoint is that of the run's test.
    tested = next(line.split()[-1] for line in printed.splitlines() if line.startswith("val/acc"))
    assert f"of 2000 test images are classified wrongly: accuracy {tested}" in printed
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    # `nin.load` on the run that was trained: the shapes that the page documents.
    assert "images (6, 28, 28) uint8\nprobabilities (6, 10) float32\nscore maps (6, 10, 3, 3) float32\n" in printed
    assert (tmp_path / "outputs" / "runs" / "chapter" / "checkpoints" / "best.ckpt").exists()
