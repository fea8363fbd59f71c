import hashlib
import struct

import pytest
import torch

from nin.checkpoints.weights import hash_weights, load_weights, require_matching_weights
from nin.config.schema import UserError


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(4, 3), "weight is float32 [4, 3], not float32 [3, 4]"),
        (torch.zeros(1), "weight is float32 [1], not float32 [3, 4]"),
        (torch.zeros(3, 4, dtype=torch.int64), "weight is int64 [3, 4], not float32 [3, 4]"),
        (torch.zeros(3, 4, dtype=torch.bool), "weight is bool [3, 4], not float32 [3, 4]"),
        (torch.full((3, 4), torch.nan), "weight has values that are NaN or infinite"),
        (torch.tensor([[0.0] * 4] * 2 + [[0.0, torch.nan, 0.0, 0.0]]), "weight has values that are NaN or infinite"),
        (torch.tensor([[torch.inf] + [0.0] * 3] + [[0.0] * 4] * 2), "weight has values that are NaN or infinite"),
        (torch.full((3, 4), -torch.inf), "weight has values that are NaN or infinite"),
        ([1.0], "weight is a list"),
        (None, "weight is missing"),
    ],
)
def test_weights_of_another_network_are_named(weight: object, message: str) -> None:
    module = torch.nn.Linear(4, 3)
    state = module.state_dict() | {"weight": weight}
    if weight is None:
        del state["weight"]
    with pytest.raises(UserError) as refused:
        load_weights(module, {"state_dict": state})
    remedy = "" if message.endswith("infinite") else "; restore the network's code"
    assert str(refused.value) == f"the checkpoint's weights are not those of the network: {message}{remedy}"
    with pytest.raises(UserError) as refused:  # of a run that is resumed
        require_matching_weights(module, {"state_dict": state})
    assert str(refused.value).endswith(f"{message}{remedy and remedy + ', or give another name=…'}")
    other = torch.nn.Linear(4, 3)
    load_weights(other, {"state_dict": module.state_dict()})
    assert torch.equal(other.weight, module.weight)


def test_the_checksum_of_a_network_is_that_of_its_weights_and_its_buffers() -> None:
    norm = torch.nn.BatchNorm1d(1)
    for mean in (0.0, 2.5):
        norm.running_mean.fill_(mean)
        values = struct.pack("<4fq", 1.0, 0.0, mean, 1.0, 0)  # weight, bias, mean, variance, number of batches
        assert hash_weights(norm) == hashlib.sha256(values).hexdigest()
