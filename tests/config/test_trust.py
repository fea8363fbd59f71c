"""A config from elsewhere is data: nothing in it is imported, called, resolved or followed."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Timer

from nin.commands import resume
from nin.config.schema import OwnLoss, Settings, UserError
from nin.config.trust import require_trusted_targets, with_local_defaults, without_training_parts
from nin.config.validation import validate_plain
from nin.data.sources import FILES, with_found_root
from nin.runs.folder import RunFolder

CLASS = "lightning.pytorch.callbacks.Timer"


def stored(settings: Callable[..., Settings], group: str = "callbacks", **entry: Any) -> Settings:
    return settings().model_copy(update={"logger": {}, "callbacks": {}, group: {"x": entry}})


def refusal(settings: Settings, *allowed: str) -> str:
    with pytest.raises(UserError) as refused:
        require_trusted_targets(settings, list(allowed))
    return str(refused.value)


@pytest.mark.parametrize(
    "target",
    [
        *("numpy.load", "torch.load", "joblib.load", "shutil.copyfile", "pathlib.Path.unlink", "this.s"),
        "nin.runs.files.write_atomically",  # a function of the project
        "nin.runs.folder.RunFolder",  # a class, of another kind
        "lightning.pytorch.trainer.trainer.os.system",
        "lightning.Trainer",
        "lightning.pytorch.loggers.CSVLogger",  # a logger is no callback
        "nin_of_somebody_else.Callback",
        "lightning.pytorch.callbacks.no_such.Thing",
        3,
    ],
)
def test_only_callbacks_of_trusted_packages_are_imported(settings: Callable[..., Settings], target: Any) -> None:
    module = str(target).partition(".")[0]
    message = refusal(stored(settings, _target_=target))
    assert message == (
        f"callbacks.x._target_={target}: a stored config may not import this class; if you trust its module, "
        f"add --allow {module}"
    )
    assert "this" not in sys.modules  # its import prints a poem


def test_refused_classes_of_all_sections_are_named_together(settings: Callable[..., Settings]) -> None:
    own = stored(settings, _target_="mine.Callback").model_copy(
        update={"loss": OwnLoss.model_validate({"_target_": "mine.Loss"})}
    )
    assert refusal(own) == (
        "loss._target_=mine.Loss, callbacks.x._target_=mine.Callback: a stored config may not import these classes; if "
        "you trust their module, add --allow mine"
    )
    other = own.model_copy(update={"loss": OwnLoss.model_validate({"_target_": "other.Loss"})})
    first, *errors = refusal(other).splitlines()
    assert first == "2 errors"
    assert [error.rpartition(", ")[2] for error in errors] == ["add --allow other", "add --allow mine"]


@pytest.mark.parametrize(
    ("target", "is_trusted"),
    [
        ("nin.networks.nin.NiN", True),
        ("nin.networks.normalize.Normalize", True),
        ("nin.networks.nin.nn.Sequential", False),  # of torch
        ("nin.networks.layers.Layer", False),  # no network
        ("nin.networks.build.initialize", False),
        ("nin.networks.build.importlib.import_module", False),
        ("nin.training.classifier.Classifier", False),
        ("nin.networks.no_such.Net", False),
    ],
)
def test_a_network_of_the_project_needs_no_permission(
    settings: Callable[..., Settings], target: str, is_trusted: bool
) -> None:
    own = {"_target_": target, "input_size": 28}
    chosen = validate_plain(settings().model_dump(mode="json") | {"model": own})
    if is_trusted:
        require_trusted_targets(chosen, [])
    else:
        assert refusal(chosen).endswith("if you trust its module, add --allow nin")


def test_classes_of_trusted_packages_and_of_allowed_modules_are_accepted(settings: Callable[..., Settings]) -> None:
    require_trusted_targets(stored(settings, _target_=CLASS), [])
    require_trusted_targets(stored(settings, "logger", _target_="lightning.pytorch.loggers.CSVLogger"), [])
    require_trusted_targets(settings(), [])  # the defaults
    # It sends what is logged to another machine.
    sends = stored(settings, "logger", _target_="lightning.pytorch.loggers.WandbLogger", project="p")
    assert "WandbLogger: a stored config may not import this class" in refusal(sends)
    require_trusted_targets(sends, ["lightning"])
    require_trusted_targets(stored(settings, _target_="my_package.part.Callback"), ["my_package"])
    assert "my_package_of_another" in refusal(stored(settings, _target_="my_package_of_another.X"), "my_package")
    # One class alone may be allowed too.
    require_trusted_targets(stored(settings, _target_="my_package.part.Callback"), ["my_package.part.Callback"])
    assert "my_package.part.C" in refusal(stored(settings, _target_="my_package.part.C"), "my_package.part.Callback")


def test_a_class_of_another_package_is_not_trusted_because_a_trusted_one_imports_it(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = type("Foreign", (Timer,), {"__module__": "somewhere"})
    monkeypatch.setattr("lightning.pytorch.callbacks.Foreign", foreign, raising=False)
    assert "add --allow lightning" in refusal(stored(settings, _target_="lightning.pytorch.callbacks.Foreign"))


@pytest.mark.parametrize(
    ("group", "entry"),
    [
        ("model", {"_target_": "this.s", "input_size": 28}),
        ("data", {"_target_": "this.s", "image_size": 28, "batch_size": 2}),
        ("loss", {"_target_": "torch.nn.Linear"}),
        ("loss", {"_target_": "my.torch.nn.CrossEntropyLoss"}),
        ("optimizer", {"_target_": "this.s"}),
        ("schedule", {"_target_": "torch.hub.load"}),
    ],
)
def test_classes_of_the_network_and_the_data_need_permission(
    settings: Callable[..., Settings], group: str, entry: dict[str, Any]
) -> None:
    foreign = validate_plain(settings().model_dump(mode="json") | {group: entry})
    module = entry["_target_"].partition(".")[0]
    assert refusal(foreign) == (
        f"{group}._target_={entry['_target_']}: a stored config may not import this class; if you trust its module, "
        f"add --allow {module}"
    )
    require_trusted_targets(foreign, [module])


@pytest.mark.parametrize(
    ("group", "target"),
    [
        ("loss", "torch.nn.MultiMarginLoss"),
        ("optimizer", "torch.optim.RMSprop"),
        ("schedule", "torch.optim.lr_scheduler.LinearLR"),
    ],
)
def test_torchs_losses_optimizers_and_schedules_need_none(
    settings: Callable[..., Settings], group: str, target: str
) -> None:
    require_trusted_targets(
        validate_plain(settings().model_dump(mode="json") | {group: {"_target_": target}}), allowed=[]
    )


def test_a_target_in_an_argument_is_refused(settings: Callable[..., Settings]) -> None:
    nested = {"_target_": CLASS, "_args_": [{"_target_": CLASS}]}
    refused = f"callbacks.x._args_.0._target_={CLASS}: a stored config may not import this class"
    assert refusal(stored(settings, **nested)).startswith(refused)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("duration", "/etc"), ("duration", "a/../../b"), ("duration", "~/x"), ("duration", "https://example.org"),
        ("dirpath", "src"), ("exclude_batches_path", "README.md"), ("tracking_uri", "example.org"), ("sub_dir", "src"),
        ("host", "example.org"),
    ],
)  # fmt: skip
def test_paths_and_addresses_outside_the_run_are_refused(
    settings: Callable[..., Settings], argument: str, value: str
) -> None:
    message = refusal(stored(settings, _target_=CLASS, **{argument: value}))
    assert message.startswith(f"callbacks.x.{argument}={value}: leads out of the run's folder")
    given = [f"callbacks.x.{argument}={value}"]
    require_trusted_targets(stored(settings, _target_=CLASS, **{argument: value}), [], given)  # the remedy


def test_an_argument_given_by_its_position_may_be_a_path(settings: Callable[..., Settings]) -> None:
    message = refusal(stored(settings, _target_="lightning.pytorch.callbacks.ModelCheckpoint", _args_=["src"]))
    assert message.startswith("callbacks.x._args_.0=src: leads out of the run's folder")


def test_mirrors_profiler_and_paths_of_a_checkpoint_are_not_followed(
    settings: Callable[..., Settings], data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIN_DATA", str(data_root))
    words = ("trainer.profiler=pytorch", "+trainer.model_registry=foreign", "data.root=/foreign")
    foreign = settings("data.mirrors=[https://example.org]", *words)
    followed = without_training_parts(foreign)
    assert followed.data.mirrors == settings().data.mirrors
    assert (followed.trainer.profiler, followed.trainer.model_registry) == (None, None)
    assert with_found_root(followed).data.root == str(data_root)
    assert (followed.logger, followed.callbacks) == ({}, {})
    # Of a larger machine.
    assert [without_training_parts(settings(f"threads={n}")).threads for n in (1, 1024)] == [1, None]
    photos = settings("data=folder", "data.root=/photos", "data.cache=/foreign")
    for local in (with_local_defaults, without_training_parts):
        assert (with_found_root(local(photos)).data.root, local(photos).data.cache) == ("/photos", None)
    resumed = with_local_defaults(foreign)
    assert (resumed.data.mirrors, resumed.trainer.profiler) == (settings().data.mirrors, None)
    assert (resumed.data.root, resumed.logger) == ("/foreign", foreign.logger)


@pytest.mark.parametrize("command", [with_local_defaults, without_training_parts])
def test_an_interpolation_is_not_resolved(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, command: Callable[[Settings], Settings]
) -> None:
    monkeypatch.setenv("SECRET", "resolved")
    with pytest.raises(UserError) as refused:
        command(stored(settings, _target_=CLASS, duration="${oc.env:SECRET}"))
    assert str(refused.value) == (
        "callbacks.x.duration=${oc.env:SECRET}: an interpolation; a stored config has plain values only"
    )


def test_overrides_of_a_foreign_run_are_not_composed(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "resolved")
    foreign = [
        *("hydra.searchpath=[pkg://this]", "+hydra.x=1", "+callbacks.x._target_=this.s", "+logger.x={_target_:this.s}"),
        *(r"trainer.accelerator=$\{oc.env:SECRET\}", "seed=0"),
    ]
    folder = RunFolder(tmp_path)
    folder.write_request(settings().model_dump(mode="json"), [])
    folder.overrides.write_text("".join(f"- '{word}'\n" for word in foreign))
    for own in (["trainer.max_epochs=3"], ["callbacks=default", "logger=csv", "trainer=cpu"]):
        resumed, overrides = resume.read_resumed_settings(folder, own, [])
        assert overrides == [*foreign, *own]
        assert "this.s" not in str(resumed)
        assert "this" not in sys.modules
        assert resumed.trainer.accelerator == "cpu"
        assert resumed.trainer.max_epochs == (3 if len(own) == 1 else 2)


def test_a_data_set_is_not_written_into_a_folder_that_a_stored_config_names(
    settings: Callable[..., Settings], tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIN_DATA", str(tmp_path / "own"))
    folder = RunFolder(tmp_path / "run")
    (tmp_path / "incomplete" / "Garments" / "raw").mkdir(parents=True)
    for name in FILES:
        (tmp_path / "incomplete" / "Garments" / "raw" / name).touch()
    own = tmp_path / "own"
    for root, expected in ((tmp_path / "foreign", own), (tmp_path / "incomplete", own), (data_root, data_root)):
        folder.write_request(
            settings().model_dump(mode="json") | {"data": settings(f"data.root={root}").data.model_dump()}, []
        )
        assert resume.read_resumed_settings(folder, [], [])[0].data.root == str(expected)


def test_a_key_that_only_the_runs_own_config_has_can_be_changed(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    chosen = settings("callbacks=early_stopping", f"+callbacks.x._target_={CLASS}", "+callbacks.x.duration=00:01:00:00")
    folder.write_request(chosen.model_dump(mode="json"), [])
    own = ["callbacks.early_stopping.patience=7", "callbacks.x.duration=00:02:00:00", "~callbacks.dead_units"]
    callbacks = resume.read_resumed_settings(folder, own, [])[0].callbacks
    assert callbacks["early_stopping"]["patience"] == 7
    assert callbacks["x"]["duration"] == "00:02:00:00"
    assert "dead_units" not in callbacks
    assert resume.read_resumed_settings(folder, ["~callbacks.early_stopping"], [])[0].callbacks.keys() == {
        "images", "dead_units", "x",
    }  # fmt: skip
    with pytest.raises(UserError, match=r"callbacks.early_stopping.patienc=7: no such key"):
        resume.read_resumed_settings(folder, ["callbacks.early_stopping.patienc=7"], [])
