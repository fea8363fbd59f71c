"""The state of every random number generator that training uses."""

import random
from typing import Any

import numpy as np
import torch


def get_random_state(device: torch.device, loader: Any) -> dict[str, Any]:
    """The states of the generators that training on ``device`` uses, as tensors and plain values.

    Args:
        loader: the training dataloader; the user's own may have generators of its own.
    """
    name, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
        "loader": [generator.get_state() for generator in _generators(loader)],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, Any], device: torch.device, loader: Any) -> None:
    """Restores the generators from `get_random_state`; that of ``device`` only if ``state`` is of its type."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    for generator, own in zip(_generators(loader), state["loader"], strict=True):
        generator.set_state(own)
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


def seed_rank(seed: int, rank: int) -> None:
    """Seeds the generators of one of several processes, which would otherwise draw the same masks as the others."""
    own = int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
    random.seed(own)
    np.random.seed(own)
    torch.manual_seed(own)  # also those of CUDA


def _generators(loader: Any) -> list[torch.Generator]:
    """Returns the generators of a dataloader and its samplers; a shared generator is listed once for each owner."""
    owners = (
        loader,
        getattr(loader, "sampler", None),
        getattr(getattr(loader, "batch_sampler", None), "sampler", None),
    )
    found = [getattr(owner, "generator", None) for owner in owners]
    return [generator for generator in found if isinstance(generator, torch.Generator)]
