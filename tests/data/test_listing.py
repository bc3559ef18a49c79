import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.fs
import pytest

from iwm_ray.data import listing
from iwm_ray.data.listing import Listing, Location, as_text, list_data
from iwm_ray.errors import UsageError


def list_path(path: Path | str) -> Listing:
    return list_data(Location.parse("data.path", str(path)))


def names(found: Listing) -> list[str]:
    return [name for folder in found.folders for name in folder.row_ids.to_pylist()]


def test_class_folders(tree: Path) -> None:
    found = list_path(tree)
    assert found.kind == "images"
    assert names(found) == ["cat/a.jpg", "cat/b.jpeg", "cat/c.JPG", "dog/a.jpg", "dog/puppies/b.jpg"]
    assert [folder.name for folder in found.folders] == ["cat", "dog", "dog/puppies"]
    sizes = [int(size) for folder in found.folders for size in folder.sizes]
    assert sizes == [(tree / name).stat().st_size for name in names(found)]
    assert found.skipped == 0


def test_order_is_independent_of_the_order_of_creation(tmp_path: Path, jpeg: bytes) -> None:
    files = [f"{kind}/{number}.jpg" for kind in "zab" for number in range(9)]
    for root, order in (("one", files), ("two", files[::-1])):
        for name in order:
            path = tmp_path / root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg)
    assert names(list_path(tmp_path / "one")) == names(list_path(tmp_path / "two")) == sorted(files)


def test_stray_files_are_passed_over_and_counted(tree: Path, jpeg: bytes) -> None:
    for name in (
        ".hidden.jpg",
        "cat/._a.jpg",
        "cat/Thumbs.db",
        "notes.txt",
        "cat/no_extension",
        "cat/x.gif",
        "a.tar.gz",
    ):
        (tree / name).write_bytes(jpeg)
    (tree / ".git").mkdir()
    (tree / ".git" / "inside.jpg").write_bytes(jpeg)
    (tree / "empty_class").mkdir()
    found = list_path(tree)
    assert len(names(found)) == 5
    assert found.skipped == 8


def test_a_folder_named_like_an_image_is_a_folder(tree: Path, jpeg: bytes) -> None:
    (tree / "cat" / "folder.jpg").mkdir()
    (tree / "cat" / "folder.jpg" / "inside.jpg").write_bytes(jpeg)
    assert "cat/folder.jpg/inside.jpg" in names(list_path(tree))


def test_links_end(tree: Path, jpeg: bytes, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "far.jpg").write_bytes(jpeg)
    (outside / "back").symlink_to(outside)
    (tree / "cat" / "dir_loop").symlink_to(".")
    (tree / "cat" / "up").symlink_to("..")
    (tree / "alias").symlink_to("dog")  # part of the tree already: not listed twice
    (tree / "linked").symlink_to(outside)
    (tree / "cat" / "self.jpg").symlink_to("self.jpg")
    (tree / "cat" / "loop_a.jpg").symlink_to("loop_b.jpg")
    (tree / "cat" / "loop_b.jpg").symlink_to("loop_a.jpg")
    (tree / "cat" / "dangling.jpg").symlink_to("nowhere.jpg")
    (tree / "cat" / "good_link.jpg").symlink_to("a.jpg")
    found = list_path(tree)
    assert names(found) == [
        *("cat/a.jpg", "cat/b.jpeg", "cat/c.JPG", "cat/good_link.jpg"),
        *("dog/a.jpg", "dog/puppies/b.jpg", "linked/far.jpg"),
    ]
    assert found.skipped == 8


def test_pipes_and_devices_are_not_opened(tree: Path) -> None:
    os.mkfifo(tree / "cat" / "pipe.jpg")
    (tree / "cat" / "device.jpg").symlink_to("/dev/zero")
    found = list_path(tree)
    assert len(names(found)) == 5
    assert found.skipped == 2
    os.mkfifo(tree.parent / "pipe.tar")
    with pytest.raises(UsageError, match=r"does not exist|needs a folder"):
        list_path(tree.parent / "pipe.tar")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_folders_are_counted(tree: Path) -> None:
    (tree / "dog").chmod(0)
    found = list_path(tree)
    (tree / "dog").chmod(0o755)
    assert len(names(found)) == 3
    assert found.skipped == 1


def test_forbidden_folders(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for root, to whom nothing is forbidden."""
    scan = os.scandir

    def guarded(path: str) -> object:
        if path.endswith(forbidden):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr("iwm_ray.data.listing.os.scandir", guarded)
    forbidden = "dog"
    assert len(names(list_path(tree))) == 3
    assert list_path(tree).skipped == 1
    forbidden = "/"
    with pytest.raises(UsageError, match=r"cannot be read \(Permission denied\)"):
        list_path(tree)


def test_odd_names(tree: Path, jpeg: bytes) -> None:
    odd = [
        "new\nline.jpg",
        "-dash.jpg",
        "comma,quote'.jpg",
        "percent%20+.jpg",
        "猫🐈‍⬛.jpg",
        "cafe\u0301.jpg",
        "caf\xe9.jpg",
    ]
    for name in odd:
        (tree / "cat" / name).write_bytes(jpeg)
    latin = os.fsencode(tree / "cat") + b"/latin1_\xe9\xff.jpg"
    Path(os.fsdecode(latin)).write_bytes(jpeg)
    found = list_path(tree)
    cat = found.folders[0]
    texts = cat.row_ids.to_pylist()
    assert len(texts) == len(set(texts)) == 3 + 8
    assert all(len(text.splitlines()) == 1 and text.encode("utf-8") for text in texts)
    assert "cat/new\\nline.jpg" in texts
    assert "cat/latin1_\\udce9\\udcff.jpg" in texts
    raw = dict(zip(texts, cat.raw_names.to_pylist(), strict=True))
    assert raw["cat/latin1_\\udce9\\udcff.jpg"] == b"cat/latin1_\xe9\xff.jpg"
    assert raw["cat/new\\nline.jpg"] == b"cat/new\nline.jpg"
    assert raw["cat/猫🐈‍⬛.jpg"] is None
    assert as_text("plain name") == "plain name"


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_shards_in_folders_files_and_patterns(tmp_path: Path, kind: str) -> None:
    for name in ("b", "a", "deep/c"):
        path = tmp_path / "shards" / f"{name}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"xy")
    (tmp_path / "shards" / "README.md").write_text("about")
    shards = tmp_path / "shards"
    found = list_path(shards)
    assert found.kind == kind
    assert [shard.name for shard in found.shards] == [f"a.{kind}", f"b.{kind}", f"deep/c.{kind}"]
    assert [shard.size for shard in found.shards] == [2, 2, 2]
    assert found.skipped == 1
    assert [shard.name for shard in list_path(shards / f"b.{kind}").shards] == [f"b.{kind}"]
    assert [shard.name for shard in list_path(shards / f"*.{kind}").shards] == [f"a.{kind}", f"b.{kind}"]
    assert [shard.name for shard in list_path(shards / f"[b-z].{kind}").shards] == [f"b.{kind}"]
    both = list_path(tmp_path / "*" / f"*.{kind}")
    assert both.root.path == str(shards)


def test_upper_case_and_shards_without_mtime_zero(tmp_path: Path) -> None:
    (tmp_path / "A.TAR").write_bytes(b"x")
    (shard,) = list_path(tmp_path).shards
    assert shard.mtime == (tmp_path / "A.TAR").stat().st_mtime_ns


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ([], "nowhere", r"data.path .*nowhere: does not exist; give --data.path"),
        ([], "", r"data.path is empty: give --data.path"),
        (
            [],
            ".",
            r"0 usable images under data.path .* \(looked for .jpg .jpeg .png .webp files, .* 0 other files\)",
        ),
        (["a.txt", "b/c.gif"], ".", r"0 usable images under data.path .*; 2 other files\)"),
        (
            ["a/x.jpg", "b.parquet"],
            ".",
            r"holds 1 parquet file\(s\) and 1 images file\(s\); name shards by a pattern",
        ),
        (["a.parquet", "b.tar"], ".", r"holds 1 parquet file\(s\) and 1 tar file\(s\)"),
        (["a.tar.gz"], ".", r"a.tar.gz is a compressed tar, .*unpack it to a plain .tar"),
        (["a.tgz"], "a.tgz", r"a.tgz is a compressed tar"),
        (["a.tar.zst"], "*.zst", r"a.tar.zst is a compressed tar"),
        (
            ["a.jpg"],
            "a.jpg",
            r"a.jpg: needs a folder of images, .parquet files of one schema or plain .tar shards",
        ),
        (["a.csv"], "a.csv", r"needs a folder of images"),
        (["a.tar", "a.parquet"], "a.*", r"needs a folder of images"),
        (["a.tar"], "*.parquet", r"no file fits this pattern"),
    ],
)
def test_unusable_places(tmp_path: Path, files: list[str], path: str, message: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UsageError, match=message) as caught:
        list_path(path if path == "" else f"{tmp_path}/{path}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "reason"), [("ftp2://host/x", "Unrecognized filesystem"), ("file://rel", "cannot be relative")]
)
def test_unknown_schemes(uri: str, reason: str) -> None:
    with pytest.raises(UsageError, match=rf"data.test_path {uri}: .*{reason}.*; needs a local path or a URI"):
        Location.parse("data.test_path", uri)


def test_messages_hold_no_secrets() -> None:
    place = Location("data.path", "s3://AKIA:secret@bucket/x?secret_key=hush", None, "bucket/x")
    assert str(place.refuse("gone")) == "data.path s3://bucket/x: gone"
    azure = Location("data.path", "abfs://box@account.dfs.core.windows.net/x", None, "box/x")
    assert "box@account" in azure.shown
    assert Location("data.path", "/data/is this?.tar", None, "").shown == "/data/is this?.tar"


def test_file_uri_is_local(tree: Path) -> None:
    place = Location.parse("data.path", tree.as_uri())
    assert place.filesystem is None
    assert names(list_data(place)) == names(list_path(tree))


def test_remote_tree_is_listed_like_a_local_one(
    tree: Path, jpeg: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / "root.png").write_bytes(jpeg)
    (tree / ".hidden").mkdir()
    (tree / ".hidden" / "x.jpg").write_bytes(jpeg)
    (tree / "notes.txt").write_bytes(jpeg)
    remote = pyarrow.fs.SubTreeFileSystem(str(tree.parent), pyarrow.fs.LocalFileSystem())
    monkeypatch.setattr(listing, "open_filesystem", lambda uri: (remote, "tree"))
    there, here = list_path("mock://bucket/tree"), list_path(tree)
    assert there.root.filesystem is remote
    assert names(there) == names(here)
    assert [folder.mtimes.tolist() for folder in there.folders] == [
        folder.mtimes.tolist() for folder in here.folders
    ]
    assert [folder.sizes.tolist() for folder in there.folders] == [
        folder.sizes.tolist() for folder in here.folders
    ]
    assert there.skipped == here.skipped == 2
    assert there.directories == ()


def test_remote_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1.tar", "a/2.tar", "b/1.tar", "a/deep/1.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    remote = pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem())
    monkeypatch.setattr(listing, "open_filesystem", lambda uri: (remote, uri.partition("://")[2]))
    assert [shard.name for shard in list_path("mock://a/*.tar").shards] == ["1.tar", "2.tar"]
    assert [shard.name for shard in list_path("mock://*/1.tar").shards] == ["a/1.tar", "b/1.tar"]
    with pytest.raises(UsageError, match="does not exist"):
        list_path("mock://c")
    with pytest.raises(UsageError, match="no file fits"):
        list_path("mock://c/*.tar")


def test_progress_is_told(tree: Path) -> None:
    told: list[int] = []
    list_data(Location.parse("data.path", str(tree)), told.append)
    assert told[-1] == 5
    assert told == sorted(told)


def test_special_files_of_the_collection(shared: Path, tmp_path: Path, jpeg: bytes) -> None:
    good = tmp_path / "good.jpg"
    good.write_bytes(jpeg)
    script = tmp_path / "make_special.py"
    shutil.copyfile(shared / "corrupt" / "make_special.py", script)
    subprocess.run([sys.executable, script, tmp_path / "special", good, "--all"], check=True)
    found = list_path(tmp_path / "special")
    assert {"good.jpg", "link_to_good.jpg", "new\\nline.jpg", "sparse_8GiB.jpg"} <= set(names(found))
    assert not {"fifo.jpg", "dangling.jpg", "loop_a.jpg", "self.jpg"} & set(names(found))
    os.chmod(tmp_path / "special" / "unreadable_dir", 0o755)  # so that pytest can remove it
