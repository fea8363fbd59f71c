from collections.abc import Callable

import pytest
import torch
from torch import nn

from nin.config.composition import compose_config
from nin.config.schema import OwnData, Settings, UserError
from nin.config.validation import validate
from nin.networks.build import require_buildable
from nin.networks.components import principal_components, start_from_components


def test_the_first_filters_give_uncorrelated_outputs_of_mean_0_the_largest_variance_first() -> None:
    torch.manual_seed(0)
    images = nn.functional.avg_pool2d(torch.rand(40, 2, 12, 12), 3, stride=1)  # neighbors are correlated
    convolution = nn.Conv2d(2, 20, 2, stride=2)  # two channels of 2x2: 8 components, so 16 filters
    drawn = convolution.weight.detach().clone()
    start_from_components(nn.Sequential(nn.Identity(), convolution, nn.Conv2d(20, 3, 1)), images)
    filters = convolution.weight.detach()
    assert torch.equal(filters[16:], drawn[16:])
    assert torch.equal(filters[1:16:2], -filters[0:16:2])
    products = filters[0:16:2].flatten(1) @ filters[0:16:2].flatten(1).T
    assert torch.allclose(products, 2 * torch.eye(8), atol=1e-5)
    outputs = convolution(images)[:, 0:16:2].detach().transpose(0, 1).flatten(1)
    covariance = outputs @ outputs.T / outputs.shape[1]
    assert torch.allclose(outputs.mean(1), torch.zeros(8), atol=1e-5)
    assert torch.allclose(covariance, covariance.diag().diag(), atol=1e-5)
    assert covariance.diag().tolist() == sorted(covariance.diag().tolist(), reverse=True)


def test_fewer_filters_than_components_are_the_first_components() -> None:
    images = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    convolution = nn.Conv2d(1, 3, 3, bias=False)
    start_from_components(convolution, images)
    _, components = principal_components(images, (3, 3), (1, 1))
    expected = 2**0.5 * torch.stack([components[0], -components[0], components[1]])
    assert torch.allclose(convolution.weight.detach().flatten(1).double(), expected, atol=1e-6)


def test_patches_of_enlarged_images_give_few_components_and_the_other_filters_stay_random() -> None:
    torch.manual_seed(0)
    images = nn.functional.interpolate(torch.rand(20, 1, 4, 4), size=64, mode="bilinear")
    convolution = nn.Conv2d(1, 96, 11, stride=4)
    drawn = convolution.weight.detach().clone()
    start_from_components(convolution, images)
    changed = (convolution.weight != drawn).flatten(1).any(1)
    assert 10 <= int(changed.sum()) <= 30
    assert bool(changed[: int(changed.sum())].all())
    assert float(convolution(images).detach().std((0, 2, 3)).min()) > 1e-3
    _, components = principal_components(torch.full((2, 1, 8, 8), 0.5), (3, 3), (1, 1))
    assert components.shape == (0, 9)


def test_a_network_without_a_convolution_and_images_of_ones_own_are_refused(settings: Callable[..., Settings]) -> None:
    with pytest.raises(UserError, match="mlp has no convolution; choose kaiming_dirac"):
        require_buildable(validate(compose_config(["model=mlp", "model.init=kaiming_dirac_pca"])))
    padded = ["model.kernel_sizes=[9,3,3]", "model.first_padding=4", "model.first_stride=1", "data.image_size=8"]
    require_buildable(settings(*padded))
    with pytest.raises(UserError, match="first convolution of 9x9 is larger than the images of 8x8"):
        require_buildable(settings(*padded, "model.init=kaiming_dirac_pca"))
    requested = settings("model.init=kaiming_dirac_pca")
    own = OwnData.model_validate({"_target_": "my.Images", "image_size": 28, "batch_size": 8})
    with pytest.raises(UserError, match=r"not those of my\.Images; choose model\.init=kaiming_dirac"):
        require_buildable(requested.model_copy(update={"data": own}))
