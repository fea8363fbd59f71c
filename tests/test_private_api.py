"""Every private part of Lightning, Hydra and torch that the project depends on, each by its name.

A new version may rename or remove them without notice. Then the test with that name fails, instead of a run that is
resumed wrongly.
"""

import ast
import importlib.metadata
import inspect
import re
import signal
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import lightning
import pytest
import torch
from lightning.fabric.connector import _PRECISION_INPUT

import nin
from nin.config.schema import CONF
from nin.config.types import Precision

SOURCE = Path(nin.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# Names with a leading underscore that belong to a dependency, and which one. Each has a test below.
PRIVATE = {
    "_actions": "argparse.ArgumentParser",
    "_BatchNorm": "torch.nn.modules.batchnorm",
    "_C": "torch",
    "_can_stop_early": "Lightning's fit loop",
    "_data_fetcher": "Lightning's fit loop",
    "_experiment": "Lightning's TensorBoardLogger",
    "_get_file_writer": "torch's SummaryWriter",
    "_inductor": "torch",
    "_internal": "hydra",
    "_last_train_dl_reload_epoch": "Lightning's fit loop",
    "_last_val_dl_reload_epoch": "Lightning's evaluation loop",
    "_jit_clear_class_registry": "torch._C",
    "_set_sampler_epoch": "lightning.fabric.utilities.data",
    "_should_accumulate": "Lightning's epoch loop",
    "_should_check_val_fx": "Lightning's epoch loop",
    "_signal_connector": "Lightning's Trainer",
    "_unset_keepalive_if_required": "uvicorn's HttpToolsProtocol",
}
PUBLIC = {"_", "_target_", "_exit", "_thread"}  # documented, in spite of the underscore


def names(tree: ast.AST) -> tuple[set[str], set[str]]:
    """The underscore names that a module uses of imported packages and of objects, and those that it defines."""
    used, defined = set(), set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name, ctx=ast.Load()):
                used.add(name)
            case (
                ast.Attribute(attr=name) | ast.Name(id=name, ctx=ast.Store()) | ast.AnnAssign(target=ast.Name(id=name))
            ):
                defined.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                defined.add(name)
            case ast.ImportFrom(module=str(module)):
                used |= {*module.split("."), *(alias.name for alias in node.names)}
            case ast.Import():
                used |= {part for alias in node.names for part in alias.name.split(".")}
    return tuple({n for n in some if n.startswith("_") and not n.startswith("__")} for some in (used, defined))


def test_no_other_private_name_is_used() -> None:
    found = [names(ast.parse(path.read_text(encoding="utf-8"))) for path in FILES]
    used, defined = (set().union(*some) for some in zip(*found, strict=True))
    assert used - defined - PUBLIC - set(PRIVATE) == set()


class Network(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.layer(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Recorder(lightning.Callback):
    """What the private names say after each of an epoch's three batches, and the state of the loops then."""

    def __init__(self) -> None:
        self.accumulates: list[bool] = []
        self.validates: list[bool] = []
        self.may_stop: list[bool] = []
        self.reloads: list[tuple[float, float]] = []
        self.states: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        loop = trainer.fit_loop.epoch_loop
        self.accumulates.append(loop._should_accumulate())
        self.validates.append(loop._should_check_val_fx(trainer.fit_loop._data_fetcher))
        self.may_stop.append(trainer.fit_loop._can_stop_early)
        self.reloads.append((trainer.fit_loop._last_train_dl_reload_epoch, loop.val_loop._last_val_dl_reload_epoch))
        self.states.append(trainer.fit_loop.state_dict())


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    recorder = Recorder()
    batches = torch.utils.data.DataLoader(torch.ones(3, 1))
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        min_epochs=2,
        accumulate_grad_batches=2,
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
    )
    trainer.fit(Network(), batches, batches)
    return recorder


def test_epoch_loop_should_accumulate(recorder: Recorder) -> None:
    assert recorder.accumulates == [True, False, False] * 2  # the last batch of an epoch ends with a step


def test_epoch_loop_should_check_val_fx_and_fit_loop_data_fetcher(recorder: Recorder) -> None:
    assert recorder.validates == [False, False, True] * 2


def test_set_sampler_epoch() -> None:
    from lightning.fabric.utilities.data import _set_sampler_epoch

    sampler = torch.utils.data.DistributedSampler(range(4), num_replicas=2, rank=0)
    loader = torch.utils.data.DataLoader(range(4), sampler=sampler)
    _set_sampler_epoch(loader, 3)
    assert sampler.epoch == 3
    _set_sampler_epoch(object(), 3)  # the user's own may have no sampler


def test_unset_keepalive_if_required() -> None:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    calls: list[str] = []
    timer = SimpleNamespace(cancel=lambda: calls.append("cancel"))
    protocol = SimpleNamespace(timeout_keep_alive_task=timer)
    HttpToolsProtocol._unset_keepalive_if_required(protocol)
    assert (protocol.timeout_keep_alive_task, calls) == (None, ["cancel"])


def test_fit_loop_can_stop_early(recorder: Recorder) -> None:
    assert recorder.may_stop == [False] * 6  # min_epochs=2


def test_fit_loop_and_evaluation_loop_last_reload_epoch(recorder: Recorder) -> None:
    assert recorder.reloads == [(0, 0)] * 3 + [(1, 0)] * 3  # the validation of the second epoch is still to come


@pytest.mark.parametrize("registers", [True, False])
def test_trainer_signal_connector(registers: bool) -> None:
    before, during = signal.getsignal(signal.SIGTERM), []

    class Handlers(lightning.Callback):
        def on_train_start(self, *_: Any) -> None:
            during.append(signal.getsignal(signal.SIGTERM))

    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=1,
        callbacks=[Handlers()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if not registers:
        trainer._signal_connector.register_signal_handlers = lambda: None
    batches = torch.utils.data.DataLoader(torch.ones(3, 1))
    trainer.fit(Network(), batches, batches)
    assert (during == [before]) is not registers
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_layout_of_the_loop_state(recorder: Recorder) -> None:
    """checkpoints/loop_state.py writes these counters; Lightning resumes from them."""
    state = recorder.states[1]  # after the second of three batches
    epoch = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    assert state["epoch_progress"] == {"total": epoch, "current": epoch}
    batch = {"ready": 2, "started": 2, "processed": 2, "completed": 1}
    assert state["epoch_loop.batch_progress"] == {"total": batch, "current": batch, "is_last_batch": False}
    validation = dict.fromkeys(("ready", "started", "processed", "completed"), 0)
    expected = {"total": validation, "current": validation, "is_last_batch": False}
    assert state["epoch_loop.val_loop.batch_progress"] == expected


HYDRA = {
    "hydra._internal.callbacks.Callbacks",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    "hydra._internal.hydra.Hydra",
    "hydra._internal.utils.create_config_search_path",
    "hydra._internal.utils.get_args_parser",
}


def test_no_other_part_of_hydra_internal_is_used() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in FILES]
    imports = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    used = {f"{node.module}.{alias.name}" for node in imports for alias in node.names}
    assert {name for name in used if name.startswith("hydra._internal")} - HYDRA == set()


def test_hydra_internal_get_args_parser_and_argparse_actions() -> None:
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    known = parser.parse_args(["-m", "seed=1,2", "--config-dir", "mine"])
    assert (known.multirun, known.overrides, known.config_dir) == (True, ["seed=1,2"], "mine")
    assert "--config-dir" in [option for action in parser._actions for option in action.option_strings]


def test_hydra_internal_hydra_and_create_config_search_path() -> None:
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    path = create_config_search_path(str(CONF))
    path.prepend("command-line", "file:///nowhere", SearchPathQuery(provider="schema", path=None))
    assert "file:///nowhere" in [entry.path for entry in path.get_path()]
    GlobalHydra.instance().clear()
    try:
        app = Hydra.create_main_hydra2("nin", create_config_search_path(str(CONF)))
        config = app.compose_config("train", ["seed=3", "name=a"], run_mode=RunMode.RUN)
        assert (config.seed, config.hydra.run.dir) == (3, "outputs/runs/a")
        assert app.config_loader.list_groups("") != []
    finally:
        GlobalHydra.instance().clear()


def test_hydra_internal_callbacks() -> None:
    from hydra._internal.callbacks import Callbacks

    hooks = ("on_run_start", "on_run_end", "on_multirun_start", "on_multirun_end")
    assert all(callable(getattr(Callbacks(), hook)) for hook in hooks)


def test_hydra_internal_basic_sweeper() -> None:
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    overrides = OverridesParser.create().parse_overrides(["seed=1,2", "name=a"])
    assert BasicSweeper.split_arguments(overrides, None) == [[["seed=1", "name=a"], ["seed=2", "name=a"]]]


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")  # deprecated; TensorBoard's graph is made with it
def test_torch_jit_clear_class_registry() -> None:
    def name_of_trace() -> str:
        graph = str(torch.jit.trace(torch.nn.Linear(3, 4), torch.zeros(1, 3)).graph)
        return re.search(r"%self : (\S+),", graph)[1]  # type: ignore[index]

    torch._C._jit_clear_class_registry()
    assert name_of_trace() == "__torch__.torch.nn.modules.linear.Linear"
    assert name_of_trace() != "__torch__.torch.nn.modules.linear.Linear"  # the name is taken while the trace is kept
    torch._C._jit_clear_class_registry()
    assert name_of_trace() == "__torch__.torch.nn.modules.linear.Linear"


def test_torch_nn_modules_batchnorm_batch_norm() -> None:
    kinds = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.SyncBatchNorm)
    assert all(issubclass(kind, torch.nn.modules.batchnorm._BatchNorm) for kind in kinds)


def test_summary_writer_get_file_writer(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    with SummaryWriter(str(tmp_path)) as writer:
        for summary in hparams({"lr": 0.1}, {"test/acc": 0.9}):
            writer._get_file_writer().add_summary(summary)
    assert list(tmp_path.glob("events.out.tfevents.*"))


# The import name of a distribution, where it is another one.
DISTRIBUTIONS = {
    "prometheus_client": "prometheus-client",
    "hydra": "hydra-core",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "pydantic_core": "pydantic-core",
}


def test_tensorboard_logger_experiment(tmp_path: Path) -> None:
    logger = lightning.pytorch.loggers.TensorBoardLogger(str(tmp_path))
    assert logger._experiment is None  # no event file before something is logged
    assert logger._experiment is not logger.experiment
    assert logger._experiment is logger.experiment
    logger.experiment.close()


def test_torch_inductor_packages() -> None:
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    assert "package_path" in inspect.signature(aoti_compile_and_package).parameters
    assert callable(aoti_load_package)


def test_every_imported_package_is_declared() -> None:
    project = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text())["project"]
    requirements = project["dependencies"] + [
        word for extra in project["optional-dependencies"].values() for word in extra
    ]
    declared = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in requirements}
    imported = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            imported |= {name.split(".")[0] for name in names}
    imported -= {*sys.stdlib_module_names, "nin"}
    assert {DISTRIBUTIONS.get(name, name) for name in imported} - declared == set()
    assert importlib.metadata.version("network-in-network") == project["version"]


def test_the_precisions_of_the_config_are_those_of_the_trainer() -> None:
    kinds = get_args(_PRECISION_INPUT)
    theirs = {value for kind in kinds for value in get_args(kind)}
    assert {*get_args(Precision)} == {"auto", *theirs}
