import json
from pathlib import Path

import pytest
from hydra.utils import get_class

from nin.config import own_classes
from nin.config.composition import compose_config
from nin.config.networks import OwnModel
from nin.config.schema import OwnSchedule, Settings, UserError
from nin.config.trust import require_allowed_classes
from nin.config.validation import validate, validate_plain


class Thing:
    def __init__(self, first: int, width: int, image_size: int = 0):
        if width > 9:
            raise ValueError("too wide")
        if width == 0:
            raise KeyError("Shirt")
        if width == 1:
            raise ModuleNotFoundError("No module named 'timm'")
        if width == 2:
            json.loads("{")
        if width < 0:
            raise FileNotFoundError(2, "No such file or directory", "weights.pt")
        self.values = first, width, image_size


class Annotated:
    def __init__(
        self, width: "int | None", rate: float = 0.5, mode: str = "a", flag: bool = False, size: "Size" = 1,
        implicit: int = None, _hidden: int = 1, model_config: str = "", copy: bool = False,  # noqa: RUF013
    ):  # fmt: skip
        self.values = width, rate, mode, flag, size


Size = tuple[int, int]


def thing(**arguments: object) -> OwnModel:
    return OwnModel.model_validate({"_target_": f"{__name__}.Thing", "input_size": 28, **arguments})


def settings_with(**sections: dict[str, object]) -> Settings:
    plain = validate(compose_config(["experiment=quickstart"])).model_dump(mode="json")
    return validate_plain(plain | sections)


KNOWN = {"Thing": Thing, "int": int, "Annotated": Annotated}


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_classes, "get_class", lambda target: KNOWN[target.rpartition(".")[2]])


def test_the_signature_decides_what_is_given() -> None:
    built = own_classes.build("model", thing(width=3), Thing, 7, image_size=28, num_classes=10)
    assert built.values == (7, 3, 28)
    assert own_classes.build("model", thing(width=3, image_size=5), Thing, 7, image_size=28).values == (7, 3, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widht": 3}, r"model.widht: .*Thing has no such argument; did you mean width\?"),
        ({"widths": 3, "norm": 1}, "model: .*Thing has no arguments widths, norm; there are: .*, as in ~model.widths$"),
        ({}, "model: .*Thing: missing a required argument: 'width'"),
        ({"width": 10}, r"model: .*Thing fails with width=10 \(ValueError: too wide\)"),
        ({"width": 0}, r"model: .* with width=0 \(KeyError: 'Shirt'\) \(test_own_classes.py:\d+, in __init__\)$"),
        # Not the line of json's file.
        ({"width": 2}, r"model: .*\(JSONDecodeError: .*\) \(test_own_classes.py:\d+, in __init__\)$"),
        ({"width": 1}, r"model: .*Thing fails with width=1 \(ModuleNotFoundError: No module named 'timm'\)"),
        ({"width": -1}, r"model: .*Thing fails with width=-1 \(FileNotFoundError: .*: 'weights.pt'\)"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        own_classes.build("model", thing(**arguments), Thing, 7)


def test_arguments_have_the_plain_types_of_their_annotations() -> None:
    def annotated(**arguments: object) -> OwnModel:
        return OwnModel.model_validate({"_target_": f"{__name__}.Annotated", "input_size": 28, **arguments})

    for width, rate in ((8, 1), (None, 0.25)):  # a whole number is a number
        built = own_classes.build("model", annotated(width=width, rate=rate, size=[3, 3]), Annotated)
        assert built.values == (width, rate, "a", False, [3, 3])
    # Names that pydantic has itself, infinity, and a default that is None.
    more = {"implicit": None, "_hidden": 8, "model_config": "b", "copy": True, "rate": float("inf")}
    given = OwnModel.model_construct(target=f"{__name__}.Annotated", input_size=28, width=3, **more)
    assert own_classes.import_class("model", given, Annotated) is Annotated
    with pytest.raises(UserError) as refused:
        own_classes.import_class("model", annotated(width=8.0, rate="0.1", mode=5, flag=1), Annotated)
    expected = {"width=8.0": "integer", 'rate="0.1"': "number", "mode=5": "string", "flag=1": "boolean"}
    assert refused.value.errors == tuple(
        f"model.{given}: must be a valid {rule}, as annotated in {__name__}.Annotated"
        for given, rule in expected.items()
    )


def test_another_kind_of_class_is_refused() -> None:
    with pytest.raises(UserError, match=r"_target_=.*Thing: must be a subclass of builtins.int"):
        own_classes.build("model", thing(), int)


def test_a_module_that_lacks_the_class_and_one_that_can_not_be_imported_have_their_own_messages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(own_classes, "get_class", get_class)  # Hydra's
    for name, code in (("needs_a_gpu", "assert False"), ("with_typo", "\ndef f(:"), ("needs_timm", "import no_timm")):
        (tmp_path / f"{name}.py").write_text(f"{code}\n")
    monkeypatch.syspath_prepend(tmp_path)
    for target, message in (
        ("pathlib.Paht", r"model._target_=pathlib.Paht: pathlib has no class Paht$"),
        ("os.getcwd", r"model._target_=os.getcwd: is no class; write one that calls it$"),
        (
            "no_such.Net",
            r"model._target_=no_such.Net: can't be imported .*; is the folder of its file in PYTHONPATH\?$",
        ),
        ("no_such.py.Net", r"; a class is named without .py: no_such.Net$"),
        ("needs_a_gpu.Net", r"can't be imported \(AssertionError\) \(needs_a_gpu.py:1, in <module>\)$"),
        ("with_typo.Net", r"can't be imported \(SyntaxError: invalid syntax\) \(with_typo.py:2\)$"),
        ("needs_timm.Net", r"imported \(No module named 'no_timm'\) \(needs_timm.py:1, in <module>\)$"),
    ):
        config = OwnModel.model_validate({"_target_": target, "input_size": 28})
        with pytest.raises(UserError, match=message):
            own_classes.import_class("model", config, int)


def test_classes_of_the_users_own_are_part_of_the_settings() -> None:
    schedule = {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 3}
    settings = settings_with(model={"_target_": "mine.Net", "input_size": 28, "width": 3}, schedule=schedule)
    assert (settings.model.name, settings.model.arguments) == ("mine.Net", {"width": 3})
    assert isinstance(settings.schedule, OwnSchedule)
    stored = settings.model_dump(mode="json")
    assert stored["model"] == {"_target_": "mine.Net", "input_size": 28, "width": 3}
    assert validate_plain(stored) == settings


def test_a_network_needs_an_input_size_and_a_class() -> None:
    with pytest.raises(UserError) as raised:
        settings_with(model={"_target_": "print", "width": 3})
    assert 'model._target_="print": must be a module and a class in it, as in my_net.Net' in raised.value.errors
    assert any(error.startswith("model.input_size: has no value") for error in raised.value.errors)


def test_a_stored_class_is_called_only_if_its_module_is_allowed() -> None:
    settings = settings_with(
        model={"_target_": "mine.Net", "input_size": 28},
        optimizer={"_target_": "torch.optim.RMSprop", "lr": 0.1},
        schedule={"_target_": "os.system", "command": "true"},
    )
    with pytest.raises(UserError) as raised:
        require_allowed_classes(settings, [])
    assert [error.partition(":")[0] for error in raised.value.errors] == [
        "model._target_=mine.Net", "schedule._target_=os.system",
    ]  # fmt: skip
    assert "add --allow mine" in raised.value.errors[0]
    require_allowed_classes(settings, ["mine", "os"])
    with pytest.raises(UserError):
        require_allowed_classes(settings, ["min", "os"])  # a part of a name is no module
