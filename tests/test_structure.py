"""A file imports only from rows below its own, and nothing heavy is imported before it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nin

SOURCE = Path(nin.__file__).parent
ROWS = [
    line.split()[0].rstrip("/,")
    for line in (nin.__doc__ or "").splitlines()
    if line.startswith("    ") and line.strip()
]


def row_of(module: str) -> int:
    first = module.removeprefix("nin").lstrip(".").split(".")[0] or "__init__"
    return ROWS.index({"cli": "__main__", "__main__": "__main__"}.get(first, first))


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_run_one_way(path: Path) -> None:
    module = ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")
    if module == "nin":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom) and node.module == "nin":
            names = [f"nin.{alias.name}" for alias in node.names]
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if name.startswith("nin."):
                assert row_of(name) >= row_of(module), f"{module} imports {name}, from a row above its own"


def test_the_row_list_names_every_room() -> None:
    rooms = {p.stem for p in SOURCE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms - {"__init__", "cli"} == set(ROWS)


def test_no_command_module_imports_torch() -> None:
    commands = [f"nin.commands.{p.stem}" for p in (SOURCE / "commands").glob("[!_]*.py")]
    program = (
        f"import sys, {', '.join(commands)}; print([m for m in ('torch', 'lightning', 'numpy') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
