import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from iwm_ray.config import DataConfig
from iwm_ray.data.index import Index
from iwm_ray.data.splits import refuse_shared_images, refuse_unknown_classes
from iwm_ray.errors import UsageError


def check(train: Path, test: Path, cache: Path, num_trained: int | None = None) -> None:
    indices = [Index.open(DataConfig(path=str(path)), str(path), cache) for path in (train, test)]
    trained, tested = (np.arange(len(index)) for index in indices)
    refuse_shared_images("--data.test-path T", indices[0], trained[:num_trained], indices[1], tested)


def test_a_part_of_the_training_folder(tree: Path, cache: Path) -> None:
    with pytest.raises(
        UsageError, match=r"--data.test-path T: 2 of 2 images .* too, such as dog/a.jpg of .*tree; give"
    ):
        check(tree, tree / "dog", cache)
    with pytest.raises(UsageError, match="T: 2 of 5 images"):
        check(tree / "dog", tree, cache)
    check(tree / "cat", tree / "dog", cache)
    check(tree, tree / "dog", cache, num_trained=3)  # the cats alone are trained on


def test_a_copy_of_the_whole_set(tree: Path, cache: Path, tmp_path: Path) -> None:
    shutil.copytree(tree, tmp_path / "copy")
    with pytest.raises(UsageError, match="T: holds the training images"):
        check(tree, tmp_path / "copy", cache)


def test_a_folder_whose_name_only_begins_alike_is_another(tree: Path, cache: Path, jpeg: bytes) -> None:
    other = tree.with_name("tree2") / "cat"
    other.mkdir(parents=True)
    (other / "a.jpg").write_bytes(jpeg)
    check(tree, other.parent, cache)


def test_rows_of_parquet_files(tmp_path: Path, cache: Path, jpeg: bytes) -> None:
    """Some of several files: the packed copies of their cells lie in different places."""
    folder = tmp_path / "table"
    folder.mkdir()
    for name, count in (("a", 3), ("b", 4), ("c", 5)):
        cells = [jpeg + f"{name}{row}".encode() for row in range(count)]
        pq.write_table(pa.table({"image": cells}), folder / f"{name}.parquet")
    with pytest.raises(UsageError, match=r"T: 4 of 4 images .* such as b.parquet:0 of"):
        check(folder, folder / "b.parquet", cache)
    with pytest.raises(UsageError, match=r"T: 2 of 4 images .* such as b.parquet:0 of"):
        check(folder, folder / "b.parquet", cache, num_trained=5)
    check(folder / "a.parquet", folder / "b.parquet", cache)


def test_members_of_tar_shards(tree: Path, tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in ("cat", "dog"):
        with tarfile.open(folder / f"{name}.tar", "w") as shard:
            for path in sorted((tree / name).rglob("*.*")):
                shard.add(path, path.name)
    with pytest.raises(UsageError, match=r"T: 2 of 2 images .* such as dog.tar/a.jpg of"):
        check(folder, folder / "dog.tar", cache)
    check(folder / "cat.tar", folder / "dog.tar", cache)


def test_a_class_that_is_not_trained_on(tree: Path, cache: Path, jpeg: bytes) -> None:
    for name in ("cat", "bird"):
        (tree.parent / "test" / name).mkdir(parents=True)
        (tree.parent / "test" / name / "z.jpg").write_bytes(jpeg)
    train, test = (
        Index.open(DataConfig(path=str(path)), str(path), cache) for path in (tree, tree.parent / "test")
    )
    with pytest.raises(UsageError, match="--data.test-path T: class bird is not among the training images"):
        refuse_unknown_classes("--data.test-path T", train, test)
    refuse_unknown_classes("--data.test-path T", test, test)
