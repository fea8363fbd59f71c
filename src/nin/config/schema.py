"""The typed config. Imports no torch, so that errors in a config are reported before heavy imports.

``conf/`` has every default value. This module, ``data_sets`` and ``networks`` have the type and range of every key.
``validation`` turns a composed config into `Settings`.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from nin.config.data_sets import Data, FolderData, LocalPath, OwnData
from nin.config.networks import OwnModel, TypedModel
from nin.config.types import Fraction, NonNegative, OwnClass, Positive, Precision, Section

_PACKAGE = Path(__file__).parents[1]
# The directory of the config groups: inside the installed package, or at the top of a checkout.
CONF = next(path for path in (_PACKAGE / "conf", _PACKAGE.parents[1] / "conf") if path.is_dir())

# With more classes than this, a test also reports whether the label is among the five most probable classes.
TOP5_CLASSES = 30


class UserError(Exception):
    """Errors of the user, each with its remedy, reported in one message: exit status 2, no traceback."""

    of_machine = False

    def __init__(self, *errors: str):
        super().__init__(*errors)
        self.errors = errors

    def __str__(self) -> str:
        if len(self.errors) == 1:
            return self.errors[0]
        return "\n  ".join([f"{len(self.errors)} errors", *self.errors])


class MachineError(UserError):
    """The machine is the reason, as with a full disk: the same settings may be accepted later."""

    of_machine = True


class SGD(Section):
    name: Literal["sgd"]
    lr: Annotated[float, Field(gt=0)]
    momentum: Fraction
    nesterov: bool
    weight_decay: Annotated[float, Field(ge=0)]


class AdamW(Section):
    name: Literal["adamw"]
    lr: Annotated[float, Field(gt=0)]
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)]
    weight_decay: Annotated[float, Field(ge=0)]


class OwnOptimizer(OwnClass):
    """A ``torch.optim.Optimizer``."""


class OwnLoss(OwnClass):
    """An ``nn.Module`` that maps logits ``(batch, classes)`` and labels ``(batch,)`` to their mean loss ``()``."""


class OwnSchedule(OwnClass):
    """A ``torch.optim.lr_scheduler.LRScheduler``.

    An argument with the value "steps" (as in ``T_max: steps``) receives the number of optimizer steps of the whole run.
    """

    interval: Literal["step", "epoch"] = "step"

    is_constant: ClassVar[bool] = False


class Schedule(Section):
    name: Literal["constant", "cosine", "one_cycle"]
    # The fraction of all steps in which the learning rate rises to optimizer.lr.
    warmup: Fraction

    @property
    def is_constant(self) -> bool:
        """Whether the learning rate is optimizer.lr in every step, without a scheduler."""
        return self.name == "constant" and not self.warmup


# Lightning's convention: an int is a number of batches, a float is a fraction of all batches.
Limit = int | float | None


class Trainer(Section):
    """The arguments of ``lightning.Trainer``, except those that this project takes from other config groups."""

    accelerator: str
    strategy: str
    devices: int | str | list[int]
    num_nodes: Positive
    precision: Precision | None
    fast_dev_run: int | bool
    max_epochs: Annotated[int, Field(ge=-1)] | None
    min_epochs: NonNegative | None
    max_steps: Annotated[int, Field(ge=-1)]
    min_steps: NonNegative | None
    max_time: str | dict[str, NonNegative] | None
    limit_train_batches: Limit
    limit_val_batches: Limit
    limit_test_batches: Limit
    limit_predict_batches: Limit
    overfit_batches: Limit
    val_check_interval: Limit | str | dict[str, int]
    check_val_every_n_epoch: Positive | None
    num_sanity_val_steps: Annotated[int, Field(ge=-1)] | None
    log_every_n_steps: Positive
    enable_progress_bar: bool | None
    enable_model_summary: bool | None
    accumulate_grad_batches: Positive
    gradient_clip_val: Annotated[float, Field(ge=0)] | None
    gradient_clip_algorithm: Literal["norm", "value"] | None
    deterministic: bool | Literal["warn"] | None
    benchmark: bool | None
    inference_mode: bool
    use_distributed_sampler: bool | None
    profiler: Literal["simple", "advanced", "pytorch", "xla"] | None
    detect_anomaly: bool
    barebones: bool
    sync_batchnorm: bool
    reload_dataloaders_every_n_epochs: NonNegative
    model_registry: str | None
    enable_autolog_hparams: bool


def is_single_process(trainer: Trainer) -> bool:
    """Whether ``trainer`` uses one device, and so one process: Lightning starts one process per device."""
    devices = trainer.devices
    one = len(devices) == 1 if isinstance(devices, list) else devices in (1, "1")
    return one and trainer.num_nodes == 1 and trainer.strategy in ("auto", "single_device")


class Speed(Section):
    """Optimizations that compute the same function. Each key changes results by rounding only."""

    # The memory format of images and feature maps in which convolutions are fastest.
    channels_last: bool
    # ReLU after max pooling instead of before it: on a quarter of the values.
    relu_after_pooling: bool
    # One kernel for all weights instead of several for each.
    fused_optimizer: bool
    # The number of images per forward and backward pass, whose gradients are accumulated; "auto": as many as
    # keep the largest maps within 18 MiB, about the size of a CPU's cache.
    micro_batch: Positive | Literal["auto"] | None


class Checkpoint(Section):
    every_n_steps: Positive | None
    every_n_minutes: Annotated[float, Field(gt=0)] | None
    # Each save renames them all.
    keep: Annotated[int, Field(ge=0, le=1000)]


class Sweep(Section):
    """The settings of a sweep or a search, and what it sets for its jobs."""

    # Whether a sweep stops at the first job that fails, instead of continuing with the others.
    fail_fast: bool
    # Set by the sweep for its jobs: the keys that it varies, the number of jobs (None: a single run),
    # and whether a job waits while another process runs it.
    keys: list[str]
    jobs: Positive | None
    wait: bool
    # Whether the test set is read at the end, and whether a pruner may end the run; a search sets both for its trials.
    test: bool
    prune: bool


class EarlyStopping(Section):
    """The arguments of ``lightning.pytorch.callbacks.EarlyStopping``, which does not check their types itself."""

    monitor: str
    min_delta: float = 0.0
    patience: NonNegative = 3
    verbose: bool = False
    mode: Literal["min", "max"] = "min"
    strict: bool = True
    check_finite: bool = True
    stopping_threshold: float | None = None
    divergence_threshold: float | None = None
    check_on_train_epoch_end: bool | None = None
    log_rank_zero_only: bool = False


class DeadUnitMonitor(Section):
    """The arguments of this project's ``DeadUnitMonitor``."""

    images: Positive = 512
    checks_per_epoch: Positive = 4
    patience_steps: NonNegative = 200


class ImageLogger(Section):
    """The arguments of this project's ``ImageLogger``."""

    wrong_images: NonNegative = 30
    sample_images: NonNegative = 32


# Which member of a union a section of the config is: a class of the user's own, or a typed one.
OWN_OR_TYPED = Discriminator(
    lambda v: "_target_" if isinstance(v, OwnClass) or (isinstance(v, dict) and "_target_" in v) else "typed"
)


NAME = r"^[\w=,+@-][\w=.,+@-]*$"  # a run's name is also the name of its folder


class Settings(Section):
    """All that determines one run; ``conf/train.yaml`` has the same keys."""

    # NumPy's generators take 32 bits.
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    # The name of the run's folder.
    name: Annotated[
        str,
        Field(pattern=NAME, max_length=200),
        BeforeValidator(lambda v: str(v) if type(v) in (int, float) else v),
    ]
    # A run's folder or a checkpoint whose weights training starts with. A default, because runs of earlier versions
    # have no such key.
    weights: LocalPath | None = None
    resume: Literal["auto", "never"]
    # CPU threads of torch. None: torch's default, or as many as the run was started with. torch takes any number,
    # and crashes with a segmentation fault when the system refuses that many threads.
    threads: Annotated[int, Field(ge=1, le=1024)] | None
    model: Annotated[Annotated[TypedModel, Tag("typed")] | Annotated[OwnModel, Tag("_target_")], OWN_OR_TYPED]
    data: Annotated[
        Annotated[Data | FolderData, Field(discriminator="name"), Tag("typed")] | Annotated[OwnData, Tag("_target_")],
        OWN_OR_TYPED,
    ]
    optimizer: Annotated[
        Annotated[SGD | AdamW, Field(discriminator="name"), Tag("typed")] | Annotated[OwnOptimizer, Tag("_target_")],
        OWN_OR_TYPED,
    ]
    schedule: Annotated[Annotated[Schedule, Tag("typed")] | Annotated[OwnSchedule, Tag("_target_")], OWN_OR_TYPED]
    # The fraction of each label that is divided among all classes.
    label_smoothing: Fraction
    # None: cross-entropy.
    loss: OwnLoss | None
    trainer: Trainer
    speed: Speed
    # torch.compile, with CUDA graphs on a GPU; "auto": on a GPU.
    compile: bool | Literal["auto"]
    checkpoint: Checkpoint
    sweep: Sweep
    # Extension points: each entry has a `_target_`, which Hydra instantiates.
    logger: dict[str, dict[str, Any]]
    callbacks: dict[str, dict[str, Any]]

    @property
    def uses_distributed_sampler(self) -> bool:
        """Whether Lightning divides the images among processes, as the project's data module does itself."""
        chosen, is_own = self.trainer.use_distributed_sampler, isinstance(self.data, OwnData)
        return is_own and not is_single_process(self.trainer) if chosen is None else chosen
