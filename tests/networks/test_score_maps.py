"""Score maps: their means are the logits, exactly for one linear layer after the maps, to first order otherwise."""

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from nin.config.schema import UserError
from nin.networks.lenet import LeNet
from nin.networks.nin import NiN
from nin.networks.normalize import Normalize
from nin.networks.score_maps import find_map_kind, forward_with_maps, grad_cam

SMALL = {"image_size": 28, "widths": (8, 12), "kernel_sizes": (3, 3, 3), "first_stride": 2, "first_padding": 2}


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def test_with_global_average_pooling_the_mean_of_the_map_is_the_logit(images: Tensor) -> None:
    network = NiN(**SMALL, final_relu=False).eval()
    assert find_map_kind(network) == "gap"
    logits, maps = forward_with_maps(network, images)
    assert maps.shape == (3, 10, 3, 3)
    assert torch.equal(logits, network(images))
    torch.testing.assert_close(maps.mean((2, 3)), logits, rtol=1e-6, atol=1e-6)


def test_with_a_fully_connected_layer_mean_and_bias_are_the_logit(images: Tensor) -> None:
    network = NiN(**SMALL, head="fc").eval()
    assert find_map_kind(network) == "fc"
    logits, maps = forward_with_maps(network, images)
    assert torch.equal(logits, network(images))
    torch.testing.assert_close(maps.mean((2, 3)) + network[-1].bias, logits, rtol=1e-5, atol=1e-5)
    # By hand, for one class at one position.
    before = nn.Sequential(*list(network)[:-2])(images)
    weights = network[-1].weight[4].view(10, 3, 3)[:, 1, 2]
    torch.testing.assert_close(maps[0, 4, 1, 2], (before[0, :, 1, 2] * weights).sum() * 9)


def test_a_sequence_of_the_users_own_has_its_maps(images: Tensor) -> None:

    class Own(nn.Sequential):
        """A config can name a class only, and no layers."""

    class Doubled(nn.Sequential):
        def forward(self, images: Tensor) -> Tensor:
            return 2 * super().forward(images)

    def as_built(*layers: nn.Module, kind: type[nn.Sequential] = Own) -> nn.Sequential:
        """As `build_network` wraps a network of the user's own, with data.normalize=true."""
        return nn.Sequential(OrderedDict(normalize=nn.Identity(), own=kind(*layers))).eval()

    pooled = as_built(nn.Conv2d(1, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert find_map_kind(pooled) == "gap"
    logits, maps = forward_with_maps(pooled, images)
    torch.testing.assert_close(maps.mean((2, 3)), pooled(images))
    assert torch.equal(logits, pooled(images))
    deep = as_built(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 26 * 26, 8), nn.ReLU(), nn.Linear(8, 5))
    assert find_map_kind(deep) is None
    assert grad_cam(deep, images).shape == (3, 5, 26, 26)
    assert find_map_kind(as_built(nn.Conv2d(1, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), kind=Doubled)) is None
    # Means of four quarters are no logits of one class each.
    assert find_map_kind(as_built(nn.Conv2d(1, 5, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten())) is None


def test_maps_are_those_before_a_global_average_pooling(images: Tensor) -> None:
    features = (nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = nn.Sequential(*features, nn.Linear(4, 5)).eval()
    assert find_map_kind(network) == "fc"
    logits, maps = forward_with_maps(network, images)
    assert torch.equal(logits, network(images))
    assert maps.shape == (3, 5, 26, 26)
    torch.testing.assert_close(maps.mean((2, 3)) + network[-1].bias, logits)
    torch.testing.assert_close(grad_cam(network, images), maps * 1.0, rtol=1e-4, atol=1e-5)
    deep = nn.Sequential(*features, nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5)).eval()
    assert grad_cam(deep, images).shape == (3, 5, 26, 26)


def test_grad_cam_is_exact_where_one_linear_layer_follows_average_pooling() -> None:
    # Of one map per class there is one gradient per map, and Grad-CAM is the class activation map itself.
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AvgPool2d(26), nn.Flatten(), nn.Linear(4, 5)).eval()
    images = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    maps = grad_cam(network, images)
    assert maps.shape == (2, 5, 1, 1)
    torch.testing.assert_close(maps.mean((2, 3)) + network[-1].bias, network(images))


def test_grad_cam_of_lenet_has_a_map_for_each_class(images: Tensor) -> None:
    network = LeNet().eval().requires_grad_(False)
    assert find_map_kind(network) is None
    with torch.no_grad():
        maps = grad_cam(network, images)
    assert maps.shape == (3, 10, 5, 5)
    assert maps.abs().amax((0, 2, 3)).min() > 0


def test_features_without_height_and_width_are_no_maps(images: Tensor) -> None:
    tokens = nn.Sequential(nn.Conv2d(1, 4, 14, stride=14), nn.Flatten(2), nn.Linear(4, 6))

    class Backbone(nn.Module):
        def __init__(self, flat: bool):
            super().__init__()
            self.tokens, self.flat = tokens, flat

        def forward(self, images: Tensor) -> Tensor:
            found = self.tokens(images)
            return found.flatten(1) if self.flat else found

    for flat in (False, True):
        network = nn.Sequential(Backbone(flat), nn.Flatten(), nn.Linear(24, 5)).eval()
        logits, maps = forward_with_maps(network, images)
        assert maps is None
        assert torch.equal(logits, network(images))
        with pytest.raises(UserError, match="which have a height and a width"):
            grad_cam(network, images)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(1, 4, 3)],
        [nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 5)],
        [Normalize(1), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 5)],  # the images are no maps
    ],
)
def test_a_network_without_maps_is_named(layers: list[nn.Module]) -> None:
    with pytest.raises(UserError, match=r"one nn\.Flatten"):
        grad_cam(nn.Sequential(*layers), torch.zeros(1, 1, 8, 8))
