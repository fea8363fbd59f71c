import gc
import subprocess
import sys
from pathlib import Path

from helpers import ENVIRONMENT
from nin.runs.imports import lightning_imports

PROGRAM = """
import gc
import logging
from nin.runs.imports import lightning_imports
collections = []
gc.callbacks.append(lambda phase, info: collections.append(phase))
for _ in range(2):
    before = gc.get_freeze_count()
    collections.clear()
    with lightning_imports():
        import lightning
        assert collections == []
    print(gc.isenabled(), min(100_000, gc.get_freeze_count() - before), logging.getLogger("lightning").handlers)
"""


def test_imports_are_not_searched_for_garbage_and_later_garbage_is_not_kept(tmp_path: Path) -> None:
    # The import of Lightning itself takes seconds. It adds a handler, which would print records a second time.
    handler = "import logging\nlogging.getLogger(__name__).addHandler(logging.StreamHandler())\n"
    (tmp_path / "lightning.py").write_text(f"{handler}objects = [[] for _ in range(100_000)]")
    environment = ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=240)
    assert (run.stdout.splitlines(), run.stderr) == (["True 100000 []", "True 0 []"], "")


def test_a_collector_that_is_off_stays_off() -> None:
    gc.disable()
    try:
        with lightning_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
