"""Network in Network on Fashion-MNIST, as a Lightning + Hydra experiment.

A package imports only from the packages below it:

    __main__        python -m nin
    cli             dispatch; nothing heavy is imported
    commands/       one file per command: arguments in, exit status out
    sweeps/         start a sweep, its workers, its jobs, their summary
    deploy/         predict, score maps, export, serve
    bench/          how fast training is, compared with the notebooks' loop and a matrix product
    training/       one run: claim the folder, train, test, write the result; the LightningModule and its callbacks
    checkpoints/    checkpoint files: atomic, checksummed, data only; the state that makes resuming exact
    data/           the LightningDataModule, data sets, resizing and augmentation
    networks/       plain torch: nin, lenet, alexnet, vgg, mlp, weight initialization, table of layers, speed
    runs/           run folders, their lock, what they print
    system/         signals, distributed processes, devices, allocator
    config/         schema, validation, composition
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nin.deploy.loading import load

__all__ = ["load"]


def __dir__() -> list[str]:
    return [*globals(), "load"]  # completed by Tab, and not imported


def __getattr__(name: str) -> Any:
    """``nin.load``, imported when it is first used: bare ``import nin`` imports nothing else."""
    if name == "load":
        from nin.deploy.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
