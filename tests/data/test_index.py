import json
import multiprocessing
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from iwm_ray.config import DataConfig
from iwm_ray.data import index as index_module
from iwm_ray.data import listing
from iwm_ray.data.decode import DecodeLimits, Undecodable, decode
from iwm_ray.data.index import Index
from iwm_ray.data.read import Reader
from iwm_ray.errors import UsageError


def open_index(path: Path | str, cache: Path, **settings: str) -> Index:
    return Index.open(DataConfig(path=str(path), **settings), str(path), cache)


@pytest.fixture
def table(tmp_path: Path, jpeg: bytes) -> Path:
    """A Parquet file of seven labelled images."""
    columns = {"image": [jpeg + bytes([i]) for i in range(7)], "label": [i % 3 for i in range(7)]}
    pq.write_table(pa.table(columns), tmp_path / "images.parquet")
    return tmp_path / "images.parquet"


def never(*args: object, **options: object) -> None:
    raise AssertionError("the data was read again")


def test_class_folders(tree: Path, cache: Path) -> None:
    (tree / "notes.txt").write_text("about")
    index = open_index(tree, cache)
    assert len(index) == 5
    assert index.labels.tolist() == [0, 0, 0, 1, 1]
    assert index.labels.dtype == np.int32
    assert index.class_names == ("cat", "dog")
    assert index.skipped == 1
    assert index.row_id(4) == "dog/puppies/b.jpg"
    assert index.path(4) == str(tree / "dog/puppies/b.jpg")
    assert index.source == str(tree)
    assert index.place(4) == (str(tree / "dog/puppies/b.jpg"), 0, -1)
    assert index.sizes[4] == (tree / "dog/puppies/b.jpg").stat().st_size
    assert [index.find(index.row_id(i)) for i in range(5)] == list(range(5))
    with pytest.raises(
        UsageError, match=r"row id 'cat/z.jpg' is not in the data; row ids look like 'cat/a.jpg'"
    ):
        index.find("cat/z.jpg")


def test_parquet(table: Path, cache: Path) -> None:
    index = open_index(table, cache)
    assert len(index) == 7
    assert index.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert index.row_id(3) == "images.parquet:3"
    assert index.path(3) == index.source == str(table)
    path, offset, size = index.place(3)
    assert Path(path).parent.parent == cache
    assert (offset, size) == (index.sizes[:3].sum(), index.sizes[3])
    assert index.is_packed


def test_a_second_opening_reads_nothing(table: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_index(table, cache)
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    monkeypatch.setattr(index_module, "scan", never)
    second = open_index(table, cache)
    assert second == first
    assert hash(second) == hash(first)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_other_settings_make_another_index(table: Path, cache: Path) -> None:
    labelled, unlabelled = open_index(table, cache), open_index(table, cache, label_column="")
    assert labelled != unlabelled
    assert unlabelled.labels.tolist() == [-1] * 7
    assert labelled.labels.max() == 2


@pytest.mark.parametrize("change", ["add", "remove", "rename", "resize", "touch"])
def test_every_change_of_the_source_is_seen(tree: Path, cache: Path, change: str) -> None:
    before = open_index(tree, cache)
    victim = tree / "cat" / "a.jpg"
    if change == "add":
        shutil.copy(victim, tree / "cat" / "new.jpg")
    elif change == "remove":
        victim.unlink()
    elif change == "rename":
        victim.rename(tree / "cat" / "other.jpg")
    elif change == "resize":
        victim.write_bytes(victim.read_bytes() + b"x")
    else:
        os.utime(victim, ns=(1, 1))
    after = open_index(tree, cache)
    assert after != before
    assert (after.hash == before.hash) == (change == "touch")
    assert len(after) == 5 + {"add": 1, "remove": -1}.get(change, 0)
    assert len(before) == 5  # the old one stays as it was


def test_hash_is_of_the_contents_not_of_the_place(tree: Path, cache: Path, tmp_path: Path) -> None:
    shutil.copytree(tree, tmp_path / "elsewhere")
    assert open_index(tmp_path / "elsewhere", cache).hash == open_index(tree, cache).hash
    (tree / "dog").rename(tree / "wolf")
    assert open_index(tmp_path / "elsewhere", cache).hash != open_index(tree, cache).hash


def large_tree(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the tree count as large and as long unchanged."""
    monkeypatch.setattr(index_module, "_RELIST_FILES", 2)
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        os.utime(folder, ns=(10**18, 10**18))


def test_large_trees_are_recognised_by_their_folders(
    tree: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large_tree(tree, monkeypatch)
    first = open_index(tree, cache)
    with monkeypatch.context() as patch:
        patch.setattr(index_module, "list_data", never)
        assert open_index(tree, cache) == first
    shutil.copy(tree / "dog" / "a.jpg", tree / "dog" / "puppies" / "c.jpg")
    assert len(open_index(tree, cache)) == 6
    assert len(first) == 5


def test_a_tree_that_has_just_changed_is_not_trusted(
    tree: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large_tree(tree, monkeypatch)
    os.utime(tree / "dog")
    open_index(tree, cache)
    monkeypatch.setattr(index_module, "list_data", never)
    with pytest.raises(AssertionError, match="read again"):
        open_index(tree, cache)


def test_a_broken_note_of_a_large_tree_is_ignored(
    tree: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large_tree(tree, monkeypatch)
    first = open_index(tree, cache)
    (note,) = (cache / "sources").iterdir()
    for content in ("{", json.dumps({"directories": [["/nowhere", 1]], "fingerprint": "x"})):
        note.write_text(content)
        assert open_index(tree, cache) == first


@pytest.mark.parametrize("damage", ["cut index", "no index", "cut images", "no images"])
def test_a_damaged_cache_is_made_again(table: Path, cache: Path, jpeg: bytes, damage: str) -> None:
    first = open_index(table, cache)
    file = first._directory / ("index.arrow" if damage.endswith("index") else "images.bin")
    del first
    if damage.startswith("cut"):
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.unlink()
    again = open_index(table, cache)
    assert Reader(again).read(6) == jpeg + bytes([6])


def test_nothing_unfinished_stays(
    table: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(index_module, "scan", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_index(table, cache)
    assert list(cache.iterdir()) == []
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match="damaged"):
        open_index(tmp_path / "bad.parquet", cache)
    assert list(cache.iterdir()) == []


def test_errors_of_the_cache_name_it(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match=r"runtime.cache .*Not a directory; give --runtime.cache DIR"):
        open_index(table, tmp_path / "file" / "cache")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index_module, "scan", full)
    with pytest.raises(UsageError, match=r"runtime.cache .*No space left on device"):
        open_index(table, tmp_path / "cache")


def test_zero_rows_and_unusable_places(tmp_path: Path, cache: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "none.parquet")
    with pytest.raises(UsageError, match=r"0 usable images under data.path .*none.parquet"):
        open_index(tmp_path / "none.parquet", cache)
    data = DataConfig(path=str(tmp_path / "none.parquet"), test_path=str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"data.test_path .*nowhere: does not exist; give --data.test-path"):
        Index.open(data, data.test_path, cache)


def _open_in_process(path: str, cache: str, results: "multiprocessing.Queue[tuple[str, int]]") -> None:
    index = Index.open(DataConfig(path=path), path, Path(cache))
    results.put((index.hash, sum(len(Reader(index).read(i)) for i in range(len(index)))))


def test_two_processes_at_once(tmp_path: Path, jpeg: bytes, cache: Path) -> None:
    columns = {"image": [jpeg + bytes([i % 256]) for i in range(2000)]}
    pq.write_table(pa.table(columns), tmp_path / "images.parquet")
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (str(tmp_path / "images.parquet"), str(cache), results)
    processes = [context.Process(target=_open_in_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert answers[0] == answers[1]
    assert answers[0][1] == 2000 * (len(jpeg) + 1)
    assert len(list(cache.iterdir())) == 1


def test_the_slower_of_two_builders_takes_what_is_there(
    table: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_index(table, cache)
    inode = (first._directory / "index.arrow").stat().st_ino
    load = index_module._load
    answers = iter([None])  # "not there yet", at the first look only
    monkeypatch.setattr(index_module, "_load", lambda directory: next(answers, load(directory)))
    assert open_index(table, cache) == first
    assert (first._directory / "index.arrow").stat().st_ino == inode
    assert [path.name for path in cache.iterdir()] == [first._directory.name]


def test_pickles_small_indices_whole_and_large_ones_as_a_path(
    tree: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = open_index(tree, cache)
    small = pickle.dumps(index)
    monkeypatch.setattr(index_module, "_INLINE_BYTES", 0)
    large = pickle.dumps(index)
    assert len(large) < 300
    for copy in (pickle.loads(small), pickle.loads(large)):
        assert copy == index
        assert copy.hash == index.hash
        assert copy.row_id(2) == index.row_id(2)
        assert copy.labels.tolist() == index.labels.tolist()
    shutil.rmtree(cache)
    assert pickle.loads(small).row_id(2) == "cat/c.JPG"  # as on another node without the cache
    with pytest.raises(UsageError, match=r"no index in .*; several nodes need a cache on shared storage"):
        pickle.loads(large)


def test_opening_takes_milliseconds_at_a_million_rows(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_rows = 1_000_000
    monkeypatch.setattr(index_module, "scan", lambda *arguments: _many_rows(num_rows))
    (tmp_path / "a.tar").write_bytes(b"x")
    open_index(tmp_path / "a.tar", cache)
    monkeypatch.setattr(index_module, "scan", never)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        index = open_index(tmp_path / "a.tar", cache)
        seconds.append(time.perf_counter() - start)
    assert len(index) == num_rows
    assert index.row_id(987_654) == "row 987654"
    assert index.find("row 987654") == 987_654
    assert min(seconds) < 0.05
    assert len(pickle.dumps(index)) < 300


def _many_rows(num_rows: int) -> index_module.Rows:
    numbers = np.arange(num_rows)
    return index_module.Rows(
        row_ids=pa.array([f"row {i}" for i in range(num_rows)], pa.large_string()),
        raw_names=pa.nulls(num_rows, pa.binary()),
        labels=(numbers % 1000).astype(np.int32),
        class_names=tuple(map(str, range(1000))),
        shards=np.zeros(num_rows, np.int32),
        offsets=numbers,
        sizes=np.ones(num_rows, np.int64),
    )


def test_labels_of_another_data_set(tmp_path: Path, cache: Path, jpeg: bytes) -> None:
    for name in ("train/ant", "train/bee", "train/cat", "test/bee", "test/dog"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x.jpg").write_bytes(jpeg)
    (tmp_path / "test" / "loose.jpg").write_bytes(jpeg)
    train, test = open_index(tmp_path / "train", cache), open_index(tmp_path / "test", cache)
    assert [test.row_id(i) for i in range(3)] == ["loose.jpg", "bee/x.jpg", "dog/x.jpg"]
    assert test.labels.tolist() == [-1, 0, 1]
    assert test.labels_in(train.class_names).tolist() == [-1, 1, -1]
    assert train.labels_in(train.class_names).tolist() == train.labels.tolist()


def test_photos_tiny_by_name(cache: Path) -> None:
    pytest.importorskip("skimage", exc_type=ImportError)
    data = DataConfig(path="photos_tiny", test_path="photos_tiny:test")
    train, test = Index.open(data, data.path, cache), Index.open(data, data.test_path, cache)
    assert (len(train), len(test)) == (1200, 300)
    assert train.class_names == test.class_names
    assert np.bincount(train.labels).tolist() == [120] * 10
    assert decode(Reader(train).read(77), DecodeLimits()).shape == (64, 64, 3)


def test_remote_source(tree: Path, table: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = pyarrow.fs.SubTreeFileSystem(str(tree.parent), pyarrow.fs.LocalFileSystem())
    monkeypatch.setattr(listing, "open_filesystem", lambda uri: (remote, uri.partition("://")[2]))
    there, here = open_index("mock://tree", cache), open_index(tree, cache)
    assert there.hash == here.hash
    assert there.uri == "mock://tree"
    assert there.path(0) == "mock://tree/cat/a.jpg"
    packed = open_index("mock://images.parquet", cache)
    assert packed.hash == open_index(table, cache).hash
    assert packed.path(0) == "mock:///images.parquet"


def test_progress_reaches_the_caller(table: Path, tree: Path, cache: Path) -> None:
    for path, count in ((table, 7), (tree, 5)):
        told: list[int] = []
        Index.open(DataConfig(path=str(path)), str(path), cache, told.append)
        assert told[-1] == count


def test_collections_beside_the_repository(shared: Path, cache: Path) -> None:
    mixed = open_index(shared / "corrupt" / "mixed_dataset", cache)
    assert mixed.class_names == ("cat", "ship", "truck")  # the folder without images is no class
    assert mixed.skipped == 3
    bad = {mixed.row_id(i) for i in range(len(mixed)) if not _decodes(mixed, i)}
    assert bad == {
        *("cat/text_renamed.jpg", "cat/truncated_50pct.jpg", "cat/zero_byte.jpg", "ship/html_as.jpg"),
        *("ship/png_bad_crc.png", "truck/bomb_header_65500x65500.jpg", "truck/random_bytes.jpg"),
    }
    shards = shared / "corrupt" / "shards"
    rows = open_index(shards / "bad_rows.parquet", cache)
    assert [i for i in range(30) if not _decodes(rows, i)] == [3, 7, 11, 15]
    assert (rows.labels[5], rows.labels[6], rows.class_names[rows.labels[8]]) == (-1, -1, "1000000")
    tar = open_index(shards / "webdataset_bad.tar", cache)
    assert [tar.row_id(i) for i in range(len(tar)) if not _decodes(tar, i)] == [
        "webdataset_bad.tar/00004.jpg"
    ]
    assert tar.labels[tar.find("webdataset_bad.tar/00009.jpg")] == -1
    for name in ("truncated.parquet", "truncated.tar", "empty.tar"):
        with pytest.raises(UsageError, match=rf"{name} is damaged or cut short"):
            open_index(shards / name, cache)
    with pytest.raises(UsageError, match=r"'image' is not in \['img_path', 'y'\]"):
        open_index(shards / "wrong_columns.parquet", cache)
    with pytest.raises(UsageError, match="0 usable images"):
        open_index(shards / "zero_rows.parquet", cache)


def _decodes(index: Index, i: int) -> bool:
    try:
        decode(Reader(index).read(i), DecodeLimits())
    except Undecodable:
        return False
    return True
