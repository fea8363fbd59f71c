"""Pictures of score maps: an overlay that is red, blue or nothing."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest

from nin.data.overlays import blend, ignore_local_matplotlibrc, largest_magnitude


def test_an_overlay_is_red_where_the_map_is_positive_blue_where_negative_and_nothing_where_0() -> None:
    image = np.full((28, 28), 100, np.uint8)
    score_map = np.array([[4.0, 4.0, 0.0, 0.0, -4.0, -4.0]] * 6)
    picture = blend(image, score_map, limit=4).astype(int)
    assert picture.shape == (224, 224, 3)
    red, none, blue = picture[112, 10], picture[112, 112], picture[112, 214]
    assert red[0] > red[2] + 40
    assert blue[2] > blue[0] + 40
    assert np.abs(none - 100).max() <= 2


def test_the_shape_of_the_image_is_kept_and_photos_are_reduced() -> None:
    assert blend(np.zeros((600, 300, 3), np.uint8), np.ones((3, 3)), 1).shape == (224, 112, 3)
    assert blend(np.zeros((1, 400), np.uint8), np.ones((3, 3)), 1).shape == (1, 224, 3)


def test_the_scale_is_the_strongest_value_of_all_maps() -> None:
    assert largest_magnitude(np.array([[1.0, -3.0], [2.0, 0.0]])) == 3
    assert largest_magnitude(np.zeros((2, 3, 3))) == 1


def test_a_matplotlibrc_in_the_working_directory_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be in a folder from elsewhere, and could start LaTeX."""
    monkeypatch.chdir(tmp_path)
    with matplotlib.rc_context({"text.usetex": True}):
        ignore_local_matplotlibrc()
        assert matplotlib.rcParams["text.usetex"]  # of the user's own file, elsewhere
        (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
        ignore_local_matplotlibrc()
        assert not matplotlib.rcParams["text.usetex"]
