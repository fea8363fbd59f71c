"""A LightningDataModule of the user's own."""

from typing import Any

from lightning import LightningDataModule

from nin.config import own_classes
from nin.config.schema import OwnData, UserError


def build_own_data(data: OwnData) -> Any:
    """Builds the class that ``data`` names, with ``image_size`` and ``batch_size`` where its signature has them.

    Its batches are ``(images, labels)``: float images ``(batch, channels, image_size, image_size)`` and int64 labels
    ``(batch,)``.

    Raises:
        UserError: if it can't be built, lacks ``class_names`` or ``channels``, or has two classes of one name.
    """
    module: Any = own_classes.build(
        "data", data, LightningDataModule, image_size=data.image_size, batch_size=data.batch_size
    )
    names, channels = getattr(module, "class_names", None), getattr(module, "channels", None)
    if not isinstance(names, list | tuple) or len(names) < 2 or not all(isinstance(name, str) for name in names):
        raise UserError(f"data: {data.target} needs an attribute class_names: a list of two or more strings")
    if repeated := sorted({str(name) for name in names if names.count(name) > 1}):
        raise UserError(f"data: {data.target} has several classes named {', '.join(repeated)}; names must differ")
    if not isinstance(channels, int) or channels < 1:
        raise UserError(f"data: {data.target} needs an attribute channels: the number of channels of its images")
    if data.score_each_epoch == "test":
        _score_test_images(module)
    return module


def _score_test_images(module: Any) -> None:
    """Gives ``module`` the loader of its test images in place of that of its validation images."""
    setup = module.setup

    def setup_with_test(stage: str) -> None:
        setup(stage)
        if stage == "fit":  # Lightning sets up the test after the fit only
            setup("test")

    module.setup, module.val_dataloader = setup_with_test, module.test_dataloader
