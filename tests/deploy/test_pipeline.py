"""A checkpoint classifies images as evaluation does, whatever form they come in."""

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import nin
from nin.checkpoints import files as checkpoint_files
from nin.checkpoints.checkpoint_io import AtomicCheckpointIO
from nin.config.composition import compose_settings
from nin.config.schema import UserError
from nin.data.transforms import resize
from nin.deploy.export import Exporter
from nin.deploy.loading import default_export, find_checkpoint
from nin.deploy.pipeline import Pipeline, read_checkpoint
from nin.networks.nin import NiN
from nin.runs.folder import RunFolder
from nin.training.classifier import Classifier
from pictures import encode, folder_data


def test_a_test_image_saved_as_png_has_the_probabilities_that_evaluation_computes(
    run_folder: Path, test_images: np.ndarray
) -> None:
    network = nin.load(run_folder)
    module, _, _ = read_checkpoint(run_folder / "checkpoints" / "best.ckpt")
    with torch.no_grad():
        seen = module.predict_logits(resize(torch.tensor(test_images[:64]), 28)).softmax(-1).numpy()
    found = network.predict([Image.open(io.BytesIO(encode(image))) for image in test_images[:64]])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, seen, rtol=0, atol=1e-6)
    assert len(set(found.argmax(1))) > 5  # the network does tell them apart


def test_the_mean_of_a_map_is_the_logit_of_both_views(run_folder: Path, test_images: np.ndarray) -> None:
    scores = nin.load(run_folder).score(test_images[:8], maps=True)
    assert scores.maps is not None
    np.testing.assert_allclose(scores.maps.mean((2, 3)), scores.logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(scores.probabilities.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize("maps", ["gap", "grad_cam"])
def test_the_maps_of_a_mirrored_image_are_mirrored_back(maps: str) -> None:
    torch.manual_seed(0)
    if maps == "gap":
        head: tuple[torch.nn.Module, ...] = (
            torch.nn.Conv2d(4, 3, 1),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
        )
    else:
        head = (torch.nn.Flatten(), torch.nn.Linear(4 * 13 * 13, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, stride=2), torch.nn.ReLU(), *head).requires_grad_(False)
    plain, both = (Pipeline(network, 1, 28, 28, test_time_flip=flip).eval() for flip in (False, True))
    assert plain.maps == maps

    def maps_of(pipeline: Pipeline, images: torch.Tensor) -> torch.Tensor:
        return pipeline(images)[2] if pipeline.has_maps else pipeline.grad_cam(images)

    images = torch.zeros(2, 28, 28, dtype=torch.uint8)
    images[0, :, 20:] = images[1, 5:, :9] = 255
    image, mirror = maps_of(plain, images), maps_of(plain, images.flip(-1))
    torch.testing.assert_close(maps_of(both, images), (image + mirror.flip(-1)) / 2)
    assert (mirror - mirror.flip(-1)).abs().max() > 0.1 * mirror.abs().max()


def test_images_of_several_sizes_keep_their_order(run_folder: Path, test_images: np.ndarray) -> None:
    network = nin.load(run_folder)
    large = np.asarray(Image.fromarray(test_images[1]).resize((90, 60)))
    mixed = network.predict([test_images[0], large, test_images[2], np.repeat(test_images[3][..., None], 3, -1)])
    alone = network.predict(test_images[:4])
    np.testing.assert_allclose(mixed[[0, 2, 3]], alone[[0, 2, 3]], atol=1e-6)
    np.testing.assert_allclose(mixed[1], network.predict([large])[0], atol=1e-6)
    assert network.predict([]).shape == (0, 10)
    with pytest.raises(ValueError, match=r"^images: there are none"):
        network.maps([])


def test_an_image_of_one_pixel_and_one_of_another_shape(run_folder: Path) -> None:
    network = nin.load(run_folder)
    black = network.predict([np.zeros((28, 28), np.uint8)])
    np.testing.assert_allclose(network.predict([np.zeros((1, 1), np.uint8)]), black, atol=1e-6)
    np.testing.assert_allclose(network.predict([np.zeros((3, 400), np.uint8)]), black, atol=1e-6)


def test_resizing_is_to_the_stored_size_and_then_to_the_networks(test_images: np.ndarray) -> None:
    network = NiN(in_channels=1, image_size=67, widths=(4, 4, 4)).eval()
    pipeline = Pipeline(network, channels=1, stored_size=28, image_size=67, test_time_flip=False)
    images = torch.tensor(test_images[:3])
    assert torch.equal(pipeline.prepare(images), resize(images, 67))


def test_colour_networks_take_colour_images() -> None:
    network = (
        NiN(in_channels=3, image_size=28, widths=(4, 4), kernel_sizes=(3, 3, 3), first_stride=2)
        .eval()
        .requires_grad_(False)
    )
    pipeline = Pipeline(network, channels=3, stored_size=32, image_size=28, test_time_flip=False)
    images = torch.zeros(2, 50, 40, 3, dtype=torch.uint8)
    images[..., 0] = 255
    pixels = pipeline.prepare(images)
    assert pixels.shape == (2, 3, 28, 28)
    assert pixels[:, 0].min() > 0.999
    assert pixels[:, 1:].max() == 0
    assert pipeline(images)[0].shape == (2, 10)


@pytest.mark.parametrize(("model", "maps"), [("mlp", "none"), ("lenet", "grad_cam")])
def test_a_network_without_maps_is_described_as_one(tmp_path: Path, model: str, maps: str) -> None:
    module = Classifier(compose_settings([f"model={model}", "data=garments"]), [str(i) for i in range(10)])
    content = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    AtomicCheckpointIO().save_checkpoint({**content, "global_step": 0, "epoch": 0}, tmp_path / "x.ckpt")
    network = nin.load(tmp_path / "x.ckpt")
    assert network.description.maps == maps
    if maps == "none":
        with pytest.raises(UserError, match=r"^this network has no score maps: they need an nn\.Sequential with"):
            network.require_maps()


def test_load_says_what_a_path_is_not(tmp_path: Path, run_folder: Path) -> None:
    with pytest.raises(UserError, match=r"no such file or folder; give .* or a \.ckpt or an \.onnx file$"):
        nin.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no checkpoint in it yet"):
        nin.load(tmp_path)
    (tmp_path / "shirt.PNG").touch()
    with pytest.raises(UserError, match=r"shirt.PNG: an image; give a run's folder, a checkpoint or an"):
        nin.load(tmp_path / "shirt.PNG")
    assert nin.load(str(run_folder / "checkpoints" / "best.ckpt")).description.class_names[1] == "Trouser"


def test_an_export_has_the_name_of_its_checkpoint(tmp_path: Path) -> None:
    assert default_export(tmp_path, ".onnx") == tmp_path / "export" / "model.onnx"
    assert default_export(tmp_path / "lr=0.01.ckpt", ".onnx") == tmp_path / "lr=0.01.onnx"


def test_weights_that_are_not_finite_classify_nothing(tmp_path: Path, run_folder: Path) -> None:
    checkpoint = checkpoint_files.read(run_folder / "checkpoints" / "best.ckpt")
    checkpoint["state_dict"]["network.0.0.weight"].fill_(torch.nan)
    AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="has values that are NaN or infinite"):
        nin.load(tmp_path / "x.ckpt")


def test_a_description_names_no_place_of_the_machine_that_trained(tmp_path: Path, run_folder: Path) -> None:
    """It becomes part of every export."""
    checkpoint = checkpoint_files.read(run_folder / "checkpoints" / "best.ckpt")
    folder = folder_data(Path("/home/me/photos"), cache="/home/me/decoded", image_size=28)
    checkpoint["hyper_parameters"]["settings"]["data"] = folder.model_dump(mode="json")
    AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "x.ckpt")
    described = nin.load(tmp_path / "x.ckpt").description.settings["data"]
    assert described == folder.model_dump(mode="json") | {"root": "data", "cache": None}
    stored = nin.load(run_folder).description.settings["data"] | {"mirrors": ["https://me:secret@example.org"]}
    checkpoint["hyper_parameters"]["settings"]["data"] = stored
    AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "x.ckpt")
    assert nin.load(tmp_path / "x.ckpt").description.settings["data"] == stored | {"mirrors": []}


def test_a_network_of_another_module_is_not_imported(tmp_path: Path, run_folder: Path) -> None:
    checkpoint = checkpoint_files.read(run_folder / "checkpoints" / "best.ckpt")
    checkpoint["hyper_parameters"]["settings"]["model"] = {"_target_": "this.s", "input_size": 28}
    AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r'model._target_=this.s: .* add --allow this \(in Python: allow=\["this"\]\)$'):
        nin.load(tmp_path / "x.ckpt")
    assert "this" not in sys.modules
    for allow in ("that", ["this"], "this"):
        with pytest.raises(UserError, match=r"^model\._target_=this\.s: ") as refused:
            nin.load(tmp_path / "x.ckpt", allow)
        assert ("may not import" in str(refused.value)) == (allow == "that")
        sys.modules.pop("this", None)


def test_a_data_module_of_ones_own_is_not_needed_to_classify(
    tmp_path: Path, run_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = checkpoint_files.read(run_folder / "checkpoints" / "best.ckpt")
    own = {"_target_": "nowhere.Data", "image_size": 28, "batch_size": 32}
    checkpoint["hyper_parameters"]["settings"]["data"] = own
    AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "x.ckpt")
    network = nin.load(tmp_path / "x.ckpt")
    assert "the images are not prepared by your data module nowhere.Data: their pixels are divided by" in caplog.text
    assert network.description.stored_size == 28
    assert network.predict(np.zeros((1, 28, 28), np.uint8)).shape == (1, 10)
    with pytest.raises(UserError, match=r"data: nowhere.Data makes its images itself, so no export"):
        Exporter(tmp_path / "x.ckpt", lambda *_: None)


def test_the_description_is_plain_and_names_the_weights(run_folder: Path) -> None:
    known = nin.load(run_folder).description
    assert (known.maps, known.channels, known.stored_size, known.test_time_flip) == ("gap", 1, 28, True)
    assert known.more["run"] == "small"
    assert len(known.more["weights_sha256"]) == 64
    json.dumps(known.more)


def test_the_test_accuracy_is_that_of_the_best_checkpoint_of_a_run(run_folder: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    shutil.copytree(run_folder / "checkpoints", run.checkpoints)
    shutil.copy(run.best, run.last)
    shutil.copy(run.best, tmp_path / "best.ckpt")

    def found(path: Path) -> object:
        return nin.load(path).description.more["test_accuracy"]

    assert found(run.path) is None  # the run has not ended
    run.write_result({"status": "finished", "metrics": {"test/acc": 0.75}})
    assert found(run.path) == found(run.best) == 0.75
    assert found(run.last) is found(tmp_path / "best.ckpt") is None
    run.result.write_text("{")
    assert found(run.path) is found(run.best) is None


def test_what_training_metrics_have_accumulated_is_not_needed(tmp_path: Path, run_folder: Path) -> None:
    """As in checkpoints of a version with other metrics."""
    checkpoint = checkpoint_files.read(run_folder / "checkpoints" / "best.ckpt")
    checkpoint["state_dict"]["train_acc.tp"] = checkpoint["state_dict"].pop("train_acc.mean_value")
    AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "x.ckpt")
    loaded, expected = nin.load(tmp_path / "x.ckpt"), nin.load(run_folder)
    assert loaded.description.more["weights_sha256"] == expected.description.more["weights_sha256"]


def test_a_job_of_a_sweep_has_a_name_of_its_own(tmp_path: Path, run_folder: Path) -> None:
    checkpoint = checkpoint_files.read(run_folder / "checkpoints" / "best.ckpt")
    checkpoint["hyper_parameters"]["settings"]["sweep"]["keys"] = ["seed"]
    AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "seed=0" / "checkpoints" / "best.ckpt")
    for given in (tmp_path / "seed=0", tmp_path / "seed=0" / "checkpoints" / "best.ckpt"):
        assert nin.load(given).description.more["run"] == "small/seed=0"


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"in_channels": 2}, "trained on images of 2 channels; nin predict"), ({"class_names": None}, "names no classes")],
)
def test_a_checkpoint_of_other_images_is_refused(
    run_folder: Path, tmp_path: Path, changed: dict[str, object], message: str
) -> None:
    checkpoint = checkpoint_files.read(run_folder / "checkpoints" / "best.ckpt")
    checkpoint["hyper_parameters"] |= changed
    AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=message):
        read_checkpoint(tmp_path / "x.ckpt")


def test_a_run_is_judged_by_its_best_checkpoint_or_by_its_last(run_folder: Path, tmp_path: Path) -> None:
    copy = RunFolder(tmp_path / "run")
    shutil.copytree(run_folder / "checkpoints", copy.checkpoints)
    shutil.copy(copy.best, copy.last)
    assert find_checkpoint(copy.path) == copy.best
    copy.best.unlink()
    assert find_checkpoint(copy.path) == copy.last
    with pytest.raises(UserError, match=f"^{tmp_path}: holds several runs; give one of them, as in {copy.path}$"):
        find_checkpoint(tmp_path)
    with pytest.raises(UserError, match=f": holds checkpoints; give the run's folder, or .*, as in {copy.last}$"):
        find_checkpoint(copy.best.parent)
