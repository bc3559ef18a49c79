import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iwm_ray.data import photos
from iwm_ray.data.photos import PATCH_SIDE, photos_tiny
from iwm_ray.errors import UsageError

missing = importlib.util.find_spec("skimage") is None or importlib.util.find_spec("sklearn") is None
needs_photos = pytest.mark.skipif(missing, reason="needs scikit-image and scikit-learn")


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return photos_tiny(tmp_path_factory.mktemp("cache"))


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.png"))}


@needs_photos
def test_ten_balanced_classes(trees: tuple[Path, Path]) -> None:
    for tree, count in zip(trees, (120, 30), strict=True):
        classes = sorted(folder.name for folder in tree.iterdir())
        assert len(classes) == 10
        assert {"astronaut", "chelsea", "china", "flower", "retina"} <= set(classes)
        assert all(len(list((tree / name).glob("*.png"))) == count for name in classes)
    assert sorted(path.name for path in trees[0].iterdir()) == sorted(
        path.name for path in trees[1].iterdir()
    )


@needs_photos
def test_patches_are_colour_images_and_all_different(trees: tuple[Path, Path]) -> None:
    files = {**contents(trees[0]), **{f"test {name}": data for name, data in contents(trees[1]).items()}}
    assert len(set(files.values())) > 0.99 * len(files)  # black corners of one photograph may repeat
    for path in [*trees[0].glob("*/060.png"), *trees[1].glob("*/015.png")]:
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("RGB", (PATCH_SIDE, PATCH_SIDE))


@needs_photos
def test_a_second_call_makes_nothing_and_a_second_cache_is_the_same(
    trees: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(photos, "_locate_photos", lambda: pytest.fail("looked for the photographs again"))
        assert photos_tiny(trees[0].parents[1]) == trees
    again = photos_tiny(tmp_path)
    assert contents(again[0]) == contents(trees[0])
    assert contents(again[1]) == contents(trees[1])
    assert [path.name for path in tmp_path.iterdir()] == [again[0].parent.name]  # nothing unfinished stays


def test_train_and_test_share_no_pixel(tmp_path: Path) -> None:
    """A photograph whose pixels tell their column: left of the edge dark, right of it bright."""
    width, height = 660, 440  # 3:2, edge at 500
    columns = np.where(np.arange(width) < 500, 10, 240).astype(np.uint8)
    pixels = np.broadcast_to(columns[None, :, None], (height, width, 3))
    Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / "photo.png")
    photos._cut(tmp_path / "photo.png", tmp_path)
    for part, level in (("train", 10), ("test", 240)):
        for path in (tmp_path / part / "photo").glob("*.png"):
            with Image.open(path) as image:
                assert set(np.asarray(image).ravel().tolist()) == {level}


def test_patches_cover_their_part() -> None:
    for part, (width, height) in photos._PARTS.items():
        corners = photos._corners(part)
        assert len(set(corners)) == len(corners)
        assert min(corners) == (0, 0)
        assert max(corners) == (width - PATCH_SIDE, height - PATCH_SIDE)


def test_missing_packages_are_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"astronaut.png, .* not found; pip install scikit-image scikit-learn"
    ):
        photos_tiny(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@needs_photos
def test_unwritable_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match=r"runtime.cache .*Not a directory; give --runtime.cache DIR"):
        photos_tiny(tmp_path / "file" / "cache")
