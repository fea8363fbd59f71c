"""A module imports only from those listed below it, and nothing heavy is imported before it is needed.

The docstring of every package's ``__init__.py`` lists its modules and subpackages from top to bottom, indented by four
spaces: names, two or more spaces, a description. Names on one line don't import each other.
"""

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nin
from nin.config.networks import NETWORKS

SOURCE = Path(nin.__file__).parent
FILES = sorted(path for path in SOURCE.rglob("*.py"))
PACKAGES = sorted(path.parent for path in FILES if path.name == "__init__.py")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")


def listed(package: Path) -> list[list[str]]:
    """The names on each line of the package's list, from top to bottom."""
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8"))) or ""
    lines = re.findall(r"^    (\S.*?)(?:  .*)?$", docstring, re.MULTILINE)
    names = [[name.rstrip("/") for name in line.split(", ")] for line in lines]
    # A network is added with its file and its YAML file alone.
    return [[*NETWORKS] if line == ["<network>"] else line for line in names]


def rows(package: Path) -> dict[str, int]:
    return {name: row for row, names in enumerate(listed(package)) for name in names}


def is_module(name: str) -> bool:
    path = SOURCE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imports(path: Path) -> Iterator[str]:
    """The modules of nin that a file imports, in functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "nin")
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute, so that they can be searched for"
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                if name.split(".")[0] == "nin":
                    yield name if is_module(name) else name.rpartition(".")[0]


def upward_import(importer: str, imported: str) -> str | None:
    """What is wrong with an import, or None: the first package that both are in lists the importer above the other."""
    ours, theirs = importer.split("."), imported.split(".")
    shared = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if shared is None:  # a package's __init__ imports its own modules; a module does not import its own package
        return None if len(ours) <= len(theirs) else f"{importer} imports its own package {imported}"
    package = ".".join(ours[:shared])
    order = rows(SOURCE.parent.joinpath(*ours[:shared]))
    if order[ours[shared]] < order[theirs[shared]]:
        return None
    return (
        f"{importer} imports {imported}, and {package}/__init__.py does not list {ours[shared]} above {theirs[shared]}"
    )


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_run_downward_only(path: Path) -> None:
    importer = module_name(path)
    assert [error for imported in imports(path) if (error := upward_import(importer, imported))] == []


def test_no_module_is_longer_than_300_lines() -> None:
    assert [path.name for path in FILES if len(path.read_text(encoding="utf-8").splitlines()) > 300] == []


@pytest.mark.parametrize("package", PACKAGES, ids=module_name)
def test_a_package_lists_all_of_its_modules(package: Path) -> None:
    modules = {path.stem for path in package.glob("*.py")} - {"__init__"}
    modules |= {path.parent.name for path in package.glob("*/__init__.py")}
    assert sorted(name for names in listed(package) for name in names) == sorted(modules)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("nin.config.schema", "nin.commands.train"),
        ("nin.commands.resume", "nin.commands.train"),
        ("nin.data.sources", "nin.data.module"),
        ("nin.networks.lenet", "nin.networks.vgg"),
        ("nin.networks.nin", "nin.networks"),
    ],
)
def test_an_import_that_does_not_run_downward_is_found(importer: str, imported: str) -> None:
    assert importlib.util.find_spec(importer)
    assert upward_import(importer, imported)
    assert upward_import("nin.cli", importer) is None


def test_at_most_fourteen_modules_and_packages_at_the_top_with_few_imports_between_them() -> None:
    assert len(rows(SOURCE)) <= 14
    pairs = {
        ("".join(module_name(path).split(".")[1:2]), "".join(imported.split(".")[1:2]))
        for path in FILES
        for imported in imports(path)
    }
    assert len([1 for importer, imported in pairs if importer != imported]) <= 45


def test_neither_the_package_nor_a_command_module_nor_a_refused_command_line_imports_torch() -> None:
    commands = [f"nin.commands.{p.stem}" for p in (SOURCE / "commands").glob("[!_]*.py")]
    program = f"""
import sys, nin.cli, {", ".join(commands)}
assert "load" in dir(nin)
for words in ([], ["seed=-1"], ["optimizer.lrr=1", "data.image_size=0"]):
    status = nin.cli.run("train", words) if words else 0
    print(status, [module for module in ("torch", "lightning", "numpy") if module in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["0 []", "2 []", "2 []"], run.stderr
