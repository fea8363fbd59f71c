"""What a machine lacks is reported before training."""

import pytest
import torch

from nin.config.composition import compose_settings
from nin.config.schema import UserError
from nin.system.devices import require_accelerator


def test_batch_norm_is_synchronized_on_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    # The accelerator is "auto", so that only the machine decides.
    trainer = compose_settings(["trainer=ddp", "trainer.devices=2", "trainer.sync_batchnorm=true"]).trainer
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"trainer\.sync_batchnorm=true: .* CUDA GPUs only; set it to false"):
        require_accelerator(trainer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    require_accelerator(trainer)
