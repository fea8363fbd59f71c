"""The weights in a checkpoint: whether they are those of a network, and their checksum."""

import hashlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nin.config.schema import UserError

TRAINING_METRICS = ("train_loss.", "train_acc.")  # tensors of a checkpoint that only a resumed run needs


def require_matching_weights(
    module: nn.Module,
    checkpoint: Mapping[str, Any],
    remedy: str = "restore the network's code, or give another name=…",
) -> None:
    """Checks that a checkpoint has the weights of ``module``, with their shapes and types, all finite.

    Any type of floating-point numbers is accepted: ``module`` is float32 until the Trainer converts it to the type of
    ``trainer.precision=bf16-true``, in which checkpoints are saved.

    Args:
        remedy: what to do if they are those of another network.

    Raises:
        UserError: names the weights that differ.
    """
    saved, current = checkpoint["state_dict"], module.state_dict()
    wrong = [
        f"{name} is {'missing' if name in current else 'unknown'}" for name in sorted(saved.keys() ^ current.keys())
    ]
    not_finite = []
    for name in (name for name in current if name in saved):
        if not isinstance(saved[name], Tensor):
            wrong.append(f"{name} is a {type(saved[name]).__name__}")
        elif saved[name].shape != current[name].shape or not _same_type(saved[name], current[name]):
            wrong.append(f"{name} is {_kind(saved[name])}, not {_kind(current[name])}")
        elif not _is_finite(saved[name], current[name]):
            not_finite.append(f"{name} has values that are NaN or infinite")
    if found := wrong + not_finite:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        end = f"{more}; {remedy}" if wrong else more
        raise UserError(f"the checkpoint's weights are not those of the network: {', '.join(found[:3])}{end}")


def load_weights(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Loads a checkpoint's weights into ``module``; raises as `require_matching_weights` does.

    Only training needs the other tensors of a checkpoint: those of a loss of the user's own, which are ignored where
    ``module`` has none, and what the training metrics have accumulated.
    """
    current = module.state_dict()
    metrics = {name: value for name, value in current.items() if name.startswith(TRAINING_METRICS)}
    weights = metrics | {
        name: value
        for name, value in checkpoint["state_dict"].items()
        if not str(name).startswith(TRAINING_METRICS) and (name in current or not str(name).startswith("loss."))
    }
    require_matching_weights(module, {"state_dict": weights}, "restore the network's code")
    module.load_state_dict(weights)


def load_matching_weights(network: nn.Module, checkpoint: Mapping[str, Any]) -> list[str]:
    """Loads a checkpoint's weights where ``network`` has weights of the same name and shape.

    Returns:
        The names of the weights that keep their values, for example those of the last layer if the classes differ.

    Raises:
        UserError: if none fits, or one is NaN or infinite.
    """
    current, prefix = network.state_dict(), "network."
    saved = {str(name).removeprefix(prefix): value for name, value in checkpoint["state_dict"].items()}
    fitting = {
        name: saved[name]
        for name, value in current.items()
        if isinstance(saved.get(name), Tensor)
        and saved[name].layout == torch.strided
        and saved[name].shape == value.shape
        and _same_type(saved[name], value)
    }
    if not any(name in fitting for name, _ in network.named_parameters()):
        raise UserError("none of its weights has the name and the shape of one of this network; is it another model?")
    if wrong := [name for name, value in fitting.items() if not _is_finite(value, current[name])]:
        raise UserError(f"{wrong[0]} has values that are NaN or infinite")
    network.load_state_dict(fitting, strict=False)
    return [name for name in current if name not in fitting]


def find_frozen(network: nn.Module) -> list[str]:
    """The names of the weights that are not trained, and of the batch norms that keep no running statistics.

    A callback may change both during training, as Lightning's BaseFinetuning does.
    """
    weights = [name for name, weight in network.named_parameters() if not weight.requires_grad]
    norms = [name for name, norm in _batch_norms(network) if not norm.track_running_stats]
    return weights + norms


def restore_frozen(network: nn.Module, frozen: Collection[str]) -> None:
    """Trains all weights but those in ``frozen``, which is of `find_frozen`."""
    for name, weight in network.named_parameters():
        weight.requires_grad_(name not in frozen)
    for name, norm in _batch_norms(network):
        norm.track_running_stats = name not in frozen


def _batch_norms(network: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    return ((name, module) for name, module in network.named_modules() if isinstance(module, _BatchNorm))


def _is_finite(saved: Tensor, current: Tensor) -> bool:
    # A buffer of the user's own network, such as a mask, may be infinite from the start.
    return bool((saved.isfinite() | ~current.cpu().isfinite()).all())


def _same_type(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype or (a.is_floating_point() and b.is_floating_point())


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def hash_weights(network: nn.Module) -> str:
    """SHA-256 of all weights and buffers, as little-endian bytes in state-dict order."""
    digest = hashlib.sha256()
    for tensor in network.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
