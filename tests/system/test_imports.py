import gc
import subprocess
import sys
from pathlib import Path

from helpers import ENVIRONMENT
from nin.system.imports import without_garbage_collection

PROGRAM = """
import gc
from nin.system.imports import without_garbage_collection
collections = []
gc.callbacks.append(lambda phase, info: collections.append(phase))
for _ in range(2):
    before = gc.get_freeze_count()
    collections.clear()
    with without_garbage_collection():
        import lightning
        assert collections == []
    print(gc.isenabled(), min(100_000, gc.get_freeze_count() - before))
"""


def test_imports_are_not_searched_for_garbage_and_later_garbage_is_not_kept(tmp_path: Path) -> None:
    # The import of Lightning itself takes seconds.
    (tmp_path / "lightning.py").write_text("objects = [[] for _ in range(100_000)]")
    environment = ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=240)
    assert (run.stdout.splitlines(), run.stderr) == (["True 100000", "True 0"], "")


def test_a_collector_that_is_off_stays_off() -> None:
    gc.disable()
    try:
        with without_garbage_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
