import io
import os
import pickle
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from iwm_ray.config import DataConfig
from iwm_ray.data import listing, read
from iwm_ray.data.decode import Undecodable
from iwm_ray.data.index import Index
from iwm_ray.data.read import Reader
from iwm_ray.errors import RunError


def reader_of(path: Path | str, cache: Path) -> Reader:
    return Reader(Index.open(DataConfig(path=str(path)), str(path), cache))


def make_shards(folder: Path, kind: str, num_shards: int = 3) -> list[bytes]:
    """Writes shards of 20 samples each; returns the samples in order."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    samples = [generator.bytes(int(size)) for size in generator.integers(1, 3000, 20 * num_shards)]
    for shard in range(num_shards):
        part = samples[20 * shard : 20 * shard + 20]
        if kind == "parquet":
            pq.write_table(pa.table({"image": part}), folder / f"{shard}.parquet")
            continue
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for number, sample in enumerate(part):
                member = tarfile.TarInfo(f"{number:03d}.jpg")
                member.size = len(sample)
                archive.addfile(member, io.BytesIO(sample))
    return samples


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_shards_are_read_bit_for_bit_in_any_order(tmp_path: Path, cache: Path, kind: str) -> None:
    samples = make_shards(tmp_path / "shards", kind)
    reader = reader_of(tmp_path / "shards", cache)
    order = np.random.default_rng(1).permutation(60)
    assert reader.read_many(order) == [samples[i] for i in order]
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.read(int(order[0])) == samples[order[0]]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(reader.read, [int(i) for i in order] * 5)) == [samples[i] for i in order] * 5


def test_folders(tree: Path, cache: Path, jpeg: bytes) -> None:
    (tree / "cat" / "empty.png").write_bytes(b"")
    (tree / "cat" / "new\nline.jpg").write_bytes(b"newline")
    Path(os.fsdecode(os.fsencode(tree) + b"/cat/latin\xe9.jpg")).write_bytes(b"latin")
    reader = reader_of(tree, cache)
    expected = {
        **{f"cat/{name}": jpeg + f"cat/{name}".encode() for name in ("a.jpg", "b.jpeg", "c.JPG")},
        **{"cat/empty.png": b"", "cat/new\\nline.jpg": b"newline", "cat/latin\\udce9.jpg": b"latin"},
        **{f"dog/{name}": jpeg + f"dog/{name}".encode() for name in ("a.jpg", "puppies/b.jpg")},
    }
    index = reader._index
    assert {index.row_id(i): reader.read(i) for i in range(len(index))} == expected


def test_open_files_are_bounded(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = make_shards(tmp_path / "shards", "tar", num_shards=6)
    monkeypatch.setattr(read, "_NUM_HANDLES", 2)
    reader = reader_of(tmp_path / "shards", cache)

    def num_open() -> int:
        links = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
        return sum(os.path.realpath(link).endswith(".tar") for link in links)

    with ThreadPoolExecutor(8) as threads:
        order = [i for k in range(20) for i in range(k, 120, 20)]
        assert list(threads.map(reader.read, order)) == [samples[i] for i in order]
    assert num_open() == 2
    del reader
    assert num_open() == 0


def failure(reader: Reader, i: int) -> str:
    with pytest.raises(Undecodable) as caught:
        reader.read(i)
    (answer,) = reader.read_many([i])
    assert isinstance(answer, Undecodable)
    assert answer.reason == caught.value.reason
    return answer.reason


def test_what_happens_to_files_later_is_a_reason_not_a_crash(tree: Path, cache: Path, tmp_path: Path) -> None:
    reader = reader_of(tree, cache)
    files = [tree / reader._index.row_id(i) for i in range(5)]
    files[0].unlink()
    files[1].unlink()
    files[1].mkdir()
    files[2].unlink()
    os.mkfifo(files[2])
    os.truncate(files[3], 1 << 33)  # sparse: 8 GiB that take no disk
    assert failure(reader, 0) == "cannot be read: No such file or directory"
    assert failure(reader, 1) in ("not a regular file", "cannot be read: Is a directory")
    assert failure(reader, 2) == "not a regular file"
    assert failure(reader, 3) == f"{1 << 33} bytes, more than the {1 << 28} that are ever loaded"
    assert isinstance(reader.read(4), bytes)


def test_forbidden_files(tree: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = reader_of(tree, cache)

    def forbidden(path: str, flags: int) -> int:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("iwm_ray.data.read.os.open", forbidden)
    assert failure(reader, 0) == "cannot be read: Permission denied"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_really_forbidden_files(tree: Path, cache: Path) -> None:
    (tree / "cat" / "a.jpg").chmod(0)
    reader = reader_of(tree, cache)
    assert failure(reader, 0) == "cannot be read: Permission denied"


def test_a_shard_cut_after_indexing(tmp_path: Path, cache: Path) -> None:
    samples = make_shards(tmp_path / "shards", "tar")
    reader = reader_of(tmp_path / "shards", cache)
    assert reader.read(19) == samples[19]
    os.truncate(tmp_path / "shards" / "0.tar", 4000)
    assert "0.tar ends inside this sample" in failure(reader, 19)
    assert reader.read(20) == samples[20]


def test_a_cache_out_of_reach_fails_the_run(tmp_path: Path, cache: Path) -> None:
    """Not one sample after another: on a node without the shared cache all of them are missing."""
    make_shards(tmp_path / "shards", "parquet")
    reader = reader_of(tmp_path / "shards", cache)
    shutil.rmtree(cache)
    with pytest.raises(
        RunError, match=r"images.bin: No such file or directory; every node must reach runtime.cache"
    ):
        reader.read_many([0])


def test_oversized_members(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(tmp_path / "shards", "tar")
    reader = reader_of(tmp_path / "shards", cache)
    monkeypatch.setattr(read, "MAX_SAMPLE_BYTES", 0)
    assert "bytes, more than the 0 that are ever loaded" in failure(reader, 0)


def test_a_stumbling_file_system_is_tried_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = make_shards(tmp_path / "shards", "tar")
    reader = reader_of(tmp_path / "shards", cache)
    pread, failures = os.pread, [OSError(5, "Input/output error"), OSError(116, "Stale file handle")]

    def stumble(*arguments: Any) -> bytes:
        if failures:
            raise failures.pop()
        return pread(*arguments)

    monkeypatch.setattr("iwm_ray.data.read.os.pread", stumble)
    monkeypatch.setattr(read, "_RETRY_SECONDS", (0.0, 0.0))
    assert reader.read(3) == samples[3]
    failures += [OSError(5, "Input/output error") for _ in range(6)]
    assert failure(reader, 3) == "cannot be read: Input/output error"


def test_remote_files(tmp_path: Path, tree: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = {kind: make_shards(tmp_path / kind, kind) for kind in ("tar", "parquet")}
    remote = pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem())
    monkeypatch.setattr(listing, "open_filesystem", lambda uri: (remote, uri.partition("://")[2]))
    for kind, expected in samples.items():
        reader = reader_of(f"mock://{kind}/*.{kind}", cache)
        assert reader.read_many(range(60)) == expected
        assert pickle.loads(pickle.dumps(reader)).read_many([59, 0]) == [expected[59], expected[0]]
    folders = reader_of("mock://tree", cache)
    assert folders.read_many(range(5)) == reader_of(tree, cache).read_many(range(5))
    (tree / "cat" / "a.jpg").unlink()
    os.truncate(tree / "cat" / "b.jpeg", 1 << 33)
    assert "cannot be read" in failure(folders, 0)
    assert "more than the" in failure(folders, 1)
