"""The typed config. Imports no torch: a mistake is told before anything heavy is loaded.

``conf/`` holds every default; this file and ``models`` hold every type and range; ``checks`` reads one into the other.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from nin.config.networks import MLP, VGG, AlexNet, LeNet, NiN, Positive, Section, Share


class UserError(Exception):
    """Mistakes of the user's, each told with its remedy, in one message: exit status 2, no traceback."""

    def __init__(self, *errors: str):
        super().__init__(*errors)
        self.errors = errors

    def __str__(self) -> str:
        if len(self.errors) == 1:
            return self.errors[0]
        return "\n  ".join([f"{len(self.errors)} errors", *self.errors])


def _as_word(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


# What val_size is taken from.
TRAINING_IMAGES = {"fashion_mnist": 60_000, "garments": 10_000}


class Data(Section):
    name: Literal["fashion_mnist", "garments"]
    root: Annotated[str, Field(min_length=1)]
    image_size: Annotated[int, Field(ge=1, le=1024)]
    batch_size: Positive
    val_size: Annotated[int, Field(ge=0)]
    # What is score after every epoch. "test" is the notebooks' habit; nothing is then chosen by it.
    score_each_epoch: Literal["val", "test"]
    augment: Literal["none", "flip", "flip_shift"]
    # Whether each image is score as it is and mirrored, and the mean of both probabilities counts.
    test_time_flip: bool
    # Where missing files are fetched from, tried in turn; garments are drawn, not fetched.
    mirrors: list[str]

    @field_validator("root")
    @classmethod
    def seen_from_anywhere(cls, root: str) -> str:
        """A checkpoint is evaluated from other folders than the one in which its run was started."""
        return str(Path(root).expanduser().absolute())


class SGD(Section):
    name: Literal["sgd"]
    lr: Annotated[float, Field(gt=0)]
    momentum: Share
    nesterov: bool
    weight_decay: Annotated[float, Field(ge=0)]

    @model_validator(mode="after")
    def nesterov_has_momentum(self):
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov=true needs momentum: set optimizer.momentum=0.9 or optimizer.nesterov=false")
        return self


class AdamW(Section):
    name: Literal["adamw"]
    lr: Annotated[float, Field(gt=0)]
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)]
    weight_decay: Annotated[float, Field(ge=0)]


class Schedule(Section):
    name: Literal["constant", "cosine", "one_cycle"]
    # The share of all steps in which the learning rate climbs to optimizer.lr.
    warmup: Share


class Trainer(Section):
    """Every argument of ``lightning.Trainer`` but those that this project fills from other groups."""

    accelerator: str
    strategy: str
    devices: int | str | list[int]
    num_nodes: Positive
    precision: int | str | None
    fast_dev_run: int | bool
    max_epochs: Annotated[int, Field(ge=-1)] | None
    min_epochs: int | None
    max_steps: Annotated[int, Field(ge=-1)]
    min_steps: int | None
    max_time: str | dict[str, int] | None
    limit_train_batches: int | float | None
    limit_val_batches: int | float | None
    limit_test_batches: int | float | None
    limit_predict_batches: int | float | None
    overfit_batches: int | float
    val_check_interval: int | float | str | dict[str, int] | None
    check_val_every_n_epoch: Positive | None
    num_sanity_val_steps: int | None
    log_every_n_steps: Positive
    enable_progress_bar: bool | None
    enable_model_summary: bool | None
    accumulate_grad_batches: Positive
    gradient_clip_val: int | float | None
    gradient_clip_algorithm: Literal["norm", "value"] | None
    deterministic: bool | Literal["warn"] | None
    benchmark: bool | None
    inference_mode: bool
    use_distributed_sampler: bool
    profiler: Literal["simple", "advanced", "pytorch", "xla"] | None
    detect_anomaly: bool
    barebones: bool
    sync_batchnorm: bool
    reload_dataloaders_every_n_epochs: Annotated[int, Field(ge=0)]
    model_registry: str | None
    enable_autolog_hparams: bool


def is_single_process(trainer: Trainer) -> bool:
    """Whether ``trainer`` stays in the process that starts it; there is one for each device."""
    devices = trainer.devices
    one = len(devices) == 1 if isinstance(devices, list) else devices in (1, "1")
    return one and trainer.num_nodes == 1 and trainer.strategy in ("auto", "single_device")


class Speed(Section):
    """How the same numbers are computed faster. Each key changes a result by rounding at most."""

    # The layout of images and maps that convolutions are fastest in.
    channels_last: bool
    # Of networks that pool the maximum; ReLU on a quarter of the maps.
    relu_after_pooling: bool
    # One kernel for all weights instead of several for each.
    fused_optimizer: bool
    # How many images are worked through at a time, gradients added up; "auto": what a CPU's cache holds.
    micro_batch: Positive | Literal["auto"] | None


class Checkpoint(Section):
    every_n_steps: Positive | None
    keep: Annotated[int, Field(ge=0)]


class Sweep(Section):
    # Whether a sweep stops at the first job that fails, instead of going on with the others.
    fail_fast: bool
    # Set by the sweep itself for its jobs: the keys that it varies, the number of jobs (None: not known beforehand),
    # and whether a job waits while another process runs it.
    keys: list[str]
    jobs: Positive | None
    wait: bool


# What a run may be told anew when it goes on; all else would make it another experiment.
MAY_CHANGE = (
    "name",
    "resume",
    "threads",
    "data.root",
    "data.mirrors",
    "speed",
    "compile",
    "checkpoint",
    "sweep",
    "logger",
    "callbacks",
    *(
        f"trainer.{key}"
        for key in (
            "accelerator", "strategy", "devices", "num_nodes", "precision", "deterministic", "benchmark", "profiler",
            "detect_anomaly", "inference_mode", "enable_progress_bar", "enable_model_summary", "log_every_n_steps",
            "max_epochs", "num_sanity_val_steps",
        )
    ),
)  # fmt: skip


class Settings(Section):
    # torch, NumPy and Python take 32 bits; 0 is a seed like any other.
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    # It becomes a folder, so it is one plain word.
    name: Annotated[
        str, BeforeValidator(_as_word), Field(pattern=r"^[\w=,+@-][\w=.,+@-]*$", min_length=1, max_length=200)
    ]
    resume: Literal["auto", "never"]
    # Of the CPU. None: as many as torch takes, or as the run began with.
    threads: Positive | None
    model: Annotated[NiN | LeNet | AlexNet | VGG | MLP, Field(discriminator="name")]
    data: Data
    optimizer: Annotated[SGD | AdamW, Field(discriminator="name")]
    schedule: Schedule
    trainer: Trainer
    speed: Speed
    # torch.compile, with CUDA graphs on a GPU; "auto": on a GPU.
    compile: bool | Literal["auto"]
    checkpoint: Checkpoint
    sweep: Sweep
    # Extension points: each entry is a `_target_` that Hydra instantiates.
    logger: dict[str, dict[str, Any]]
    callbacks: dict[str, dict[str, Any]]


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"model": {"norm": "none"}}`` becomes ``{"model.norm": "none"}``."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def is_within(key: str, prefixes: tuple[str, ...] | list[str]) -> bool:
    """Whether ``key`` is one of ``prefixes`` or lies below one: ``speed.micro_batch`` is within ``speed``."""
    return f"{key}.".startswith(tuple(f"{prefix}." for prefix in prefixes))


def project_conf() -> Path:
    """The folder of config groups: inside the installed package, or at the top of a checkout."""
    package = Path(__file__).parents[1]
    return next(p for p in (package / "conf", package.parents[1] / "conf") if p.is_dir())
