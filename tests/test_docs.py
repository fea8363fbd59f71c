"""What the documents state is so: the page of plain PyTorch, and the links and commands of README and docs/."""

import hashlib
import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from omegaconf import DictConfig, OmegaConf

import nin as package
from nin import cli
from nin.config.composition import compose_config, compose_settings, first_job_overrides
from nin.config.keys import flatten
from nin.config.schema import CONF, UserError
from nin.config.validation import validate

ROOT = Path(__file__).parents[1]
PLAIN_LOOP = ROOT / "docs" / "plain_loop.py"
# Two epochs of ten batches, the tenth with 3 images: a new order and an incomplete batch are part of the comparison.
EXPERIMENT = {"image_size": 67, "batch_size": 8, "val_size": 9925}


def _plain_loop() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plain_loop", PLAIN_LOOP)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _speed_off() -> list[str]:
    """The overrides that docs/architecture.md gives for the comparison."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    command = text.split("    nin train name=plain ", 1)[1].split("\n\n", 1)[0]
    return command.replace("\\", " ").split()


def test_the_plain_loop_ends_with_the_weights_of_nin_train(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = [f"data.{key}={value}" for key, value in EXPERIMENT.items()]
    limits = ["trainer.max_epochs=2", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
    train = [
        "name=plain", *_speed_off(), "data=garments", f"data.root={data_root}", "threads=1",
        *overrides, *limits, "callbacks=none", "logger=none",
    ]  # fmt: skip
    threads = torch.get_num_threads()
    assert cli.run("train", train) == 0
    result = json.loads((tmp_path / "outputs/runs/plain/result.json").read_text())
    assert result["steps"] == 20

    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            network = _plain_loop().train(str(data_root / "Garments" / "raw"), **EXPERIMENT, epochs=2)
    finally:
        torch.set_num_threads(threads)
    weights = b"".join(weight.numpy().tobytes() for weight in network.state_dict().values())
    assert hashlib.sha256(weights).hexdigest() == result["weights_sha256"]


def test_the_plain_loop_is_one_page_of_plain_pytorch() -> None:
    lines = PLAIN_LOOP.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 80
    imports = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert imports == {"hashlib", "sys", "pathlib", "numpy", "torch", "torchvision"}


PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_experiment_and_sweep_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(
        r"\b(experiment|sweep|model|data|optimizer|schedule|trainer|logger)=(\w+)", page.read_text("utf-8")
    )
    # The examples of docs/extending.md: files of a config folder of the user's own.
    own = set(re.findall(r"`my/(\w+)/(\w+)\.yaml`", page.read_text("utf-8"))) | {("experiment", "mine")}
    assert [option for option in named if option not in own and not (CONF / f"{'/'.join(option)}.yaml").is_file()] == []


def test_the_commands_of_pages_and_recipes_compose() -> None:
    own = "(tiny|stripes|weighted|rmsprop|mine|steps)"  # names of the examples of docs/extending.md
    commands = set()
    for path in (*PAGES, *CONF.rglob("*.yaml")):
        text = re.sub(r"\\\n\s*", "", path.read_text(encoding="utf-8"))
        for line in re.findall(r"^(?:#|    )[# ]*(nin (?:train|bench|inspect) [^#\n…]+)(?:#.*)?$", text, re.MULTILINE):
            words = shlex.split(re.split(" {3,}", line.strip())[0])
            # A sweep is composed for its first job; sweepers and launchers only in a sweep.
            given = [word for word in words if re.match(r"[+~]?[\w./]+=", word) and not word.startswith("hydra")]
            if given and not re.search(rf"={own}\b", line):
                commands.add(tuple(sorted(first_job_overrides(given))))
    assert len(commands) > 30
    tried: set[str] = set()
    for command in sorted(commands, key=len, reverse=True):
        if not tried.issuperset(command):  # a composition takes a tenth of a second
            compose_settings(list(command))
        tried.update(command)


def test_the_readme_fits_on_a_few_screens_and_has_the_two_lines_of_the_start() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= 9000
    assert "\n    python3 -m pip install uv && python3 -m uv run nin train experiment=quickstart\n" in text
    assert "\n    python3 -m pip install uv && python3 -m uv run pytest\n" in text


def test_the_package_list_in_the_architecture_page_is_that_of_the_package() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [line for line in (package.__doc__ or "").splitlines() if line.startswith("    ")]
    assert rows
    assert "\n".join(rows) in page


CONFIG_PAGE = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
GROUPS, _, KEYS = CONFIG_PAGE.partition("## The run")
# Key, default, values. In the rows of the trainer the third column is Lightning's default.
KEY_ROWS = re.findall(r"^\| `([\w.]+)` \| ([^|]+) \| ([^|]*) \|", KEYS, re.MULTILINE)
# Further options of the groups, of which the page gives keys or defaults.
OPTIONS = (
    "data=folder", "data=garments", "model=nin_small", "model=lenet", "model=alexnet", "model=mlp", "optimizer=adamw",
    "schedule=cosine", "schedule=one_cycle", "callbacks=early_stopping", "callbacks=ema",
)  # fmt: skip


@pytest.fixture(scope="module")
def composed() -> dict[str, DictConfig]:
    configs = {"": compose_config([])}
    for option in OPTIONS:
        configs[option.partition("=")[2]] = compose_config([option, "data.root=photos"])
    return configs


def _flat(config: DictConfig) -> dict:
    return flatten(OmegaConf.to_container(config, resolve=False))  # type: ignore[arg-type]


def test_the_config_page_has_every_key(composed: dict[str, DictConfig]) -> None:
    keys = {key for config in composed.values() for key in _flat(config)}
    # Which class or option it is; the arguments of Lightning's classes; what a sweep sets.
    keys = {key for key in keys if key.rpartition(".")[2] not in ("_target_", "name") or key == "name"}
    keys -= {key for key in keys if key.startswith(("trainer.", "logger.")) or key == "callbacks.early_stopping.mode"}
    set_by_sweeps = {f"sweep.{key}" for key in re.findall(r"`sweep\.(\w+)`[,a ]", CONFIG_PAGE)}
    documented = {key for key, _, _ in KEY_ROWS if not key.startswith(("hydra.", "trainer."))}
    assert len(KEY_ROWS) > 60
    assert documented | set_by_sweeps == keys


def test_the_config_page_has_the_defaults(composed: dict[str, DictConfig]) -> None:
    wrong = {}
    for key, default, _ in KEY_ROWS:
        for part in default.split("; "):
            option, text = re.fullmatch(r"(?:`(\w+)`: )?(?:of )?(.+)", part).groups()  # type: ignore[union-attr]
            if not (value := re.fullmatch("`(.+)`", text)) or key.startswith("hydra."):
                continue
            found = [_flat(config) for name, config in composed.items() if not option or option == name]
            first = next((config[key] for config in found if key in config), "no such key")
            if first != yaml.safe_load(value[1]):
                wrong[key] = first
    assert wrong == {}


def test_the_config_page_has_the_values_that_are_accepted(composed: dict[str, DictConfig]) -> None:
    wrong = []
    for key, _, values in KEY_ROWS:
        literals = [yaml.safe_load(value) for value in re.findall("`([^`]+)`", values)]
        if key == "name" or not literals or key.startswith("trainer."):
            continue
        config = next(config for config in composed.values() if key in _flat(config)).copy()
        wrong += [f"{key}={value}" for value in literals if _is_refused(config, key, value)]
        wrong += [f"{key}=other"] * (not _is_refused(config, key, "other"))
    assert wrong == []


def _is_refused(config: DictConfig, key: str, value: object) -> bool:
    OmegaConf.update(config, key, value)
    try:
        validate(config)
    except UserError as error:
        return any(re.match(rf"{re.escape(key)}(\.\d+)?=.*: must be", message) for message in error.errors)
    return False


def _ends(values: str) -> tuple[list[float], list[float]]:
    """The values at the ends of a range in the page's words that are accepted, and those that are refused."""
    plain = values.replace("2³² − 1", str(2**32 - 1)).replace(",", "")
    if found := re.search(r"(\d+) to (below )?(\d+)", plain):
        low, high = int(found[1]), int(found[3])
        return ([low, high - 0.001], [low - 1, high]) if found[2] else ([low, high], [low - 1, high + 1])
    if found := re.search(r"(at least|above) (\d+)", plain):
        low = int(found[2])
        return ([low], [low - 1]) if found[1] == "at least" else ([low + 0.001], [low])
    return [], []


def test_the_config_page_has_the_ranges_that_are_accepted(composed: dict[str, DictConfig]) -> None:
    wrong, tried = [], 0
    for key, _, values in KEY_ROWS:
        accepted, refused = _ends(values)
        if not accepted or key.startswith(("trainer.", "callbacks.ema.")):  # the latter's are checked by Lightning
            continue
        config = next(config for config in composed.values() if key in _flat(config)).copy()
        is_list = isinstance(_flat(config)[key], list)
        for value in (*accepted, *refused):
            tried += 1
            if _is_refused(config, key, [value, value] if is_list else value) != (value in refused):
                wrong.append(f"{key}={value}")
    assert tried > 80
    assert wrong == []


def test_the_config_page_has_every_option_of_every_group() -> None:
    rows = re.findall(r"^\| `([\w/]+)` \| ((?:`\w+`(?:, )?)+) \|", GROUPS, re.MULTILINE)
    page = {group: sorted(re.findall(r"\w+", options)) for group, options in rows}
    groups = {path.parent for path in CONF.rglob("*.yaml")} - {CONF}
    assert page == {
        str(group.relative_to(CONF)): sorted(path.stem for path in group.glob("*.yaml")) for group in groups
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_whole_and_lines_of_text_fit(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("|") and not lines[i - 1].startswith("|")]
    assert [lines[i] for i in starts if not re.fullmatch(r"(\| --- )+\|", lines[i + 1])] == []
    assert [line for line in lines if len(line) > 120 and not line.startswith(("|", "!["))] == []


def test_the_lines_of_the_config_files_fit() -> None:
    long = [line for path in CONF.rglob("*.yaml") for line in path.read_text("utf-8").splitlines() if len(line) > 120]
    assert long == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_module_that_a_page_names_has_what_the_page_says(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`(\w+)`\s+in\s+`(\w+/\w+\.py)`", text)
    files = [("", path) for path in re.findall(r"`((?:training|data|config|networks|runs|sweeps)/\w+\.py)`", text)]
    missing = [
        (name, path)
        for name, path in (*named, *files)
        if not (source := ROOT / "src" / "nin" / path).is_file() or name not in source.read_text(encoding="utf-8")
    ]
    assert missing == []
