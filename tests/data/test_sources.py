import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iwm_ray.config import DataConfig
from iwm_ray.data import sources
from iwm_ray.data.listing import Location, list_data
from iwm_ray.data.sources import Rows, number_classes, scan
from iwm_ray.errors import UsageError


def scan_path(path: Path, packed: Path | None = None, **columns: str) -> Rows:
    packed = packed or path.parent / "packed.bin"
    with open(packed, "wb") as output:
        return scan(list_data(Location.parse("data.path", str(path))), DataConfig(**columns), output)


def cell(rows: Rows, packed: Path, i: int) -> bytes:
    return packed.read_bytes()[rows.offsets[i] : rows.offsets[i] + rows.sizes[i]]


# Labels


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.one_of(st.none(), st.integers(-3, 9)), max_size=30))
def test_integer_labels_become_class_numbers(values: list[int | None]) -> None:
    labels, names = number_classes(pa.array(values, pa.int64()))
    known = sorted({value for value in values if value is not None and value >= 0})
    assert names == tuple(map(str, known))
    assert labels.dtype == np.int32
    assert labels.tolist() == [known.index(value) if value in known else -1 for value in values]


def test_labels_that_count_from_zero_are_kept() -> None:
    labels, names = number_classes(pa.array([2, 0, 1, None, -1, 2]))
    assert labels.tolist() == [2, 0, 1, -1, -1, 2]
    assert names == ("0", "1", "2")


def test_string_labels_are_sorted() -> None:
    labels, names = number_classes(pa.chunked_array([["dog", "", "cat"], [None, "10", "9"]]))
    assert names == ("10", "9", "cat", "dog")
    assert labels.tolist() == [3, -1, 2, -1, 0, 1]
    assert number_classes(pa.array([], pa.large_string())) == (pytest.approx(np.zeros(0)), ())


def test_captions_are_no_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_CLASSES", 3)
    with pytest.raises(ValueError, match="4 different labels, more than 3"):
        number_classes(pa.array(["a", "b", "c", "d"]))


# Folders


def test_first_folder_names_the_class(tree: Path, jpeg: bytes) -> None:
    (tree / "root.png").write_bytes(jpeg)
    (tree / "ant").mkdir()
    (tree / "ant" / "readme.txt").write_text("no images here")
    rows = scan_path(tree)
    assert rows.class_names == ("cat", "dog")
    labels = dict(zip(rows.row_ids.to_pylist(), rows.labels.tolist(), strict=True))
    assert labels == {
        **{"root.png": -1, "cat/a.jpg": 0, "cat/b.jpeg": 0, "cat/c.JPG": 0},
        **{"dog/a.jpg": 1, "dog/puppies/b.jpg": 1},
    }


def test_flat_folder_is_unlabelled(tmp_path: Path, jpeg: bytes) -> None:
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.jpg").write_bytes(jpeg)
    rows = scan_path(tmp_path / "flat")
    assert rows.labels.tolist() == [-1]
    assert rows.class_names == ()


# Parquet


def write_table(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


CELLS = [b"first", b"", None, b"a" * 3000, b"fifth"] * 7


@pytest.mark.parametrize(
    "kind",
    [
        pa.binary(),
        pa.large_binary(),
        pa.dictionary(pa.int32(), pa.binary()),
        pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    ],
    ids=str,
)
def test_parquet_cells_are_packed_bit_for_bit(tmp_path: Path, kind: pa.DataType) -> None:
    if pa.types.is_struct(kind):
        cells = pa.array(
            [None if i == 4 else {"bytes": each, "path": "x.jpg"} for i, each in enumerate(CELLS)], kind
        )
    else:
        cells = pa.array([None if i == 4 else each for i, each in enumerate(CELLS)], pa.binary()).cast(kind)
    path = write_table(tmp_path / "a.parquet", {"image": cells, "label": list(range(35))}, row_group_size=11)
    rows = scan_path(path)
    for i, expected in enumerate(CELLS):
        assert cell(rows, tmp_path / "packed.bin", i) == ((expected or b"") if i != 4 else b"")
    assert rows.labels.tolist() == list(range(35))
    assert rows.row_ids.to_pylist() == [f"a.parquet:{i}" for i in range(35)]
    assert (tmp_path / "packed.bin").stat().st_size == rows.sizes.sum()


@settings(max_examples=20, deadline=None)
@given(
    tables=st.lists(
        st.lists(st.one_of(st.none(), st.binary(max_size=40)), max_size=25), min_size=1, max_size=4
    )
)
def test_several_files_are_one_after_another(
    tables: list[list[bytes | None]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tables")
    for number, cells in enumerate(tables):
        pq.write_table(pa.table({"image": pa.array(cells, pa.binary())}), folder / f"{number}.parquet")
    packed = folder / "packed.bin"
    rows = scan_path(folder, packed)
    twin = [
        (f"{number}.parquet:{row}", number, value or b"")
        for number, cells in enumerate(tables)
        for row, value in enumerate(cells)
    ]
    assert rows.row_ids.to_pylist() == [name for name, _, _ in twin]
    assert rows.shards.tolist() == [number for _, number, _ in twin]
    assert [cell(rows, packed, i) for i in range(len(twin))] == [value for _, _, value in twin]
    assert rows.labels.tolist() == [-1] * len(twin)


def test_row_ids_come_from_their_column_if_they_are_unique(tmp_path: Path) -> None:
    columns = {"image": [b"x", b"y"], "row_id": ["n1", "n2"]}
    assert scan_path(write_table(tmp_path / "a.parquet", columns)).row_ids.to_pylist() == ["n1", "n2"]
    assert scan_path(
        write_table(tmp_path / "b.parquet", {**columns, "row_id": [7, 8]})
    ).row_ids.to_pylist() == ["7", "8"]
    for given_ids in (["n1", "n1"], ["n1", None]):
        path = write_table(tmp_path / "c.parquet", {**columns, "row_id": given_ids})
        assert scan_path(path).row_ids.to_pylist() == ["c.parquet:0", "c.parquet:1"]


@pytest.mark.parametrize(
    ("labels", "numbers", "names"),
    [
        (pa.array(["b", "a"]), [1, 0], ("a", "b")),
        (pa.array(["b", "a"]).dictionary_encode(), [1, 0], ("a", "b")),
        (pa.array([True, False]), [1, 0], ("0", "1")),
        (pa.array([1, None], pa.uint8()), [0, -1], ("1",)),
        (pa.array([-1, 1_000_000]), [-1, 0], ("1000000",)),
        (pa.nulls(2), [-1, -1], ()),
    ],
)
def test_label_types(tmp_path: Path, labels: pa.Array, numbers: list[int], names: tuple[str, ...]) -> None:
    rows = scan_path(write_table(tmp_path / "a.parquet", {"image": [b"x", b"y"], "label": labels}))
    assert (rows.labels.tolist(), rows.class_names) == (numbers, names)


def test_other_column_names(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", {"jpg": [b"x"], "fine": ["b"], "label": [3]})
    rows = scan_path(path, image_column="jpg", label_column="fine")
    assert rows.class_names == ("b",)
    assert scan_path(path, image_column="jpg", label_column="").labels.tolist() == [-1]


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"img": [b"x"]}, {}, r"data.image_column 'image' is not in \['img'\] of a.parquet"),
        ({"image": ["text"]}, {}, r"'image' of a.parquet has type string; needs binary, or a struct"),
        ({"image": [[1, 2]]}, {}, r"has type list<.*>; needs binary"),
        ({"image": [{"path": "x.jpg"}]}, {}, r"has type struct<path: string>; needs binary"),
        ({"image": [b"x"]}, {"label_column": "fine"}, r"data.label_column 'fine' is not in \['image'\]"),
        (
            {"image": [b"x"], "label": [0.5]},
            {},
            r"'label' of a.parquet has type double; needs integers or strings",
        ),
        ({"image": [b"x"], "label": [[1]]}, {}, r"needs integers or strings; '' means no labels"),
        (
            {"image": [b"x"], "label": pa.array([2**63], pa.uint64())},
            {},
            r"data.label_column 'label' of a.parquet: .*",
        ),
    ],
)
def test_wrong_columns(
    tmp_path: Path, columns: dict[str, Any], settings: dict[str, str], message: str
) -> None:
    path = write_table(tmp_path / "a.parquet", columns)
    with pytest.raises(UsageError, match=message) as caught:
        scan_path(path, **settings)
    assert "\n" not in str(caught.value)


def test_files_of_one_set_must_agree(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write_table(folder / "a.parquet", {"image": [b"x"], "label": [1]})
    write_table(folder / "b.parquet", {"image": [b"x"], "label": ["one"]})
    with pytest.raises(UsageError, match=r"b.parquet has other columns than a.parquet"):
        scan_path(folder)


def test_damaged_parquet(tmp_path: Path) -> None:
    path = write_table(
        tmp_path / "a.parquet", {"image": [bytes([i]) * 5000 for i in range(50)]}, compression="zstd"
    )
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"PAR1", whole[:100] + bytes(400) + whole[500:]):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match=r"a.parquet is damaged or cut short \(.*\); copy it again"):
            scan_path(path)


def test_oversized_cells_are_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_SAMPLE_BYTES", 100)
    path = write_table(tmp_path / "a.parquet", {"image": [b"before", bytes(101), b"behind"]})
    rows = scan_path(path)
    assert rows.sizes.tolist() == [6, 101, 6]  # the size tells the reader to refuse it
    assert (tmp_path / "packed.bin").read_bytes() == b"beforebehind"
    assert cell(rows, tmp_path / "packed.bin", 2) == b"behind"


def test_too_little_space_is_told_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk:
        f_bavail, f_frsize = 1, 4096

    monkeypatch.setattr("iwm_ray.data.sources.os.fstatvfs", lambda descriptor: FullDisk)
    path = write_table(tmp_path / "a.parquet", {"image": [np.random.default_rng(0).bytes(9000)]})
    with pytest.raises(
        UsageError, match=r"holds 0.0 GB, more than runtime.cache has free; give --runtime.cache DIR"
    ):
        scan_path(path)
    assert (tmp_path / "packed.bin").stat().st_size == 0


# Tar shards


def write_tar(path: Path, members: list[tuple[str, bytes]], **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def images_of(rows: Rows, path: Path) -> dict[str, bytes]:
    content = path.read_bytes()
    places = zip(rows.row_ids.to_pylist(), rows.offsets, rows.sizes, strict=True)
    return {name: content[offset : offset + size] for name, offset, size in places}


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_members_and_labels(tmp_path: Path, tar_format: int) -> None:
    long_name = "d" * 60 + "/" + "f" * 80
    path = write_tar(
        tmp_path / "s.tar",
        [
            *(
                ("a/0001.jpg", b"one"),
                ("a/0001.cls", b"2\n"),
                ("a/0002.json", b'{"label": 0}'),
                ("a/0002.png", b"two" * 400),
            ),
            *(
                ("a/0003.cls", b"-1"),
                ("a/0003.left.jpg", b"3l"),
                ("a/0003.right.webp", b"3r"),
                ("a/0004.jpeg", b""),
            ),
            *((f"{long_name}.JPG", b"five"), (f"{long_name}.cls", b"1")),
        ],
        format=tar_format,
    )
    rows = scan_path(path)
    assert images_of(rows, path) == {
        **{"s.tar/a/0001.jpg": b"one", "s.tar/a/0002.png": b"two" * 400, "s.tar/a/0003.left.jpg": b"3l"},
        **{"s.tar/a/0003.right.webp": b"3r", "s.tar/a/0004.jpeg": b"", f"s.tar/{long_name}.JPG": b"five"},
    }
    assert rows.labels.tolist() == [2, 0, -1, -1, -1, 1]
    assert rows.class_names == ("0", "1", "2")
    assert rows.skipped == 0


def test_text_labels_in_tar(tmp_path: Path) -> None:
    members = [
        ("0.jpg", b"x"),
        ("0.cls", "größe".encode()),
        ("1.jpg", b"x"),
        ("1.json", b'{"label": 7}'),
        ("2.jpg", b"x"),
    ]
    rows = scan_path(write_tar(tmp_path / "s.tar", members))
    assert rows.class_names == ("7", "größe")
    assert rows.labels.tolist() == [1, 0, -1]


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"{", b"[1]", b'{"other": 1}', b'{"label": [1]}', b"[" * 100_000, b""]
)
def test_unreadable_labels_mean_none(tmp_path: Path, content: bytes) -> None:
    for suffix in ("json", "cls"):
        rows = scan_path(
            write_tar(
                tmp_path / "s.tar",
                [("0.jpg", b"x"), (f"0.{suffix}", content if suffix == "json" else b"\xff")],
            )
        )
        assert rows.labels.tolist() == [-1]


def test_pickles_links_and_hidden_members_are_never_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.tar"
    names = ("0.pkl", "0.pt", "0.pth", "0.pyd", "._0.jpg", "0.txt")
    write_tar(path, [("0.jpg", b"x"), ("0.cls", b"4"), *((name, b"\x80\x04never") for name in names)])
    with tarfile.open(path, "a") as archive:
        for kind, target in (
            (tarfile.SYMTYPE, "/etc/hostname"),
            (tarfile.LNKTYPE, "0.jpg"),
            (tarfile.CHRTYPE, ""),
            (tarfile.FIFOTYPE, ""),
            (tarfile.DIRTYPE, ""),
        ):
            member = tarfile.TarInfo("1.jpg")
            member.type, member.linkname = kind, target
            archive.addfile(member)
    parsed: list[bytes] = []
    parse = sources._parse_label
    monkeypatch.setattr(
        sources, "_parse_label", lambda content, suffix: parsed.append(content) or parse(content, suffix)
    )
    rows = scan_path(path)
    assert rows.row_ids.to_pylist() == ["s.tar/0.jpg"]
    assert rows.skipped == len(names)
    assert parsed == [b"4"]


def test_names_that_lead_elsewhere_are_only_names(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "s.tar", [("../../up.jpg", b"x"), ("/abs.jpg", b"y"), ("line\nbreak.jpg", b"z")]
    )
    before = sorted(tmp_path.rglob("*"))
    rows = scan_path(path)
    assert rows.row_ids.to_pylist() == ["s.tar/../../up.jpg", "s.tar//abs.jpg", "s.tar/line\\nbreak.jpg"]
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "packed.bin"])


def test_damaged_tars(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [(f"{i}.jpg", bytes([i]) * 700) for i in range(10)])
    whole = path.read_bytes()
    middle = whole[: 3 * 1536 + 100] + b"\xff" * 200 + whole[3 * 1536 + 300 :]  # inside the fourth header
    for damaged in (whole[:5000], whole[: 3 * 1536], whole[: 3 * 1536 + 200], middle, b"", b"text" * 500):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match=r"s.tar is damaged or cut short \(.*\); copy it again"):
            scan_path(path)


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_compressed_tar_under_a_plain_name(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, f"w:{mode}") as archive:  # type: ignore[call-overload]
        archive.addfile(tarfile.TarInfo("0.jpg"))
    with pytest.raises(UsageError, match=r"s.tar is a compressed tar, .*unpack it"):
        scan_path(path)


def test_several_tars(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(3):
        write_tar(
            folder / f"{number}.tar",
            [("0.jpg", bytes([number])), ("0.json", json.dumps({"label": f"c{number}"}).encode())],
        )
    rows = scan_path(folder)
    assert rows.row_ids.to_pylist() == ["0.tar/0.jpg", "1.tar/0.jpg", "2.tar/0.jpg"]
    assert rows.shards.tolist() == [0, 1, 2]
    assert rows.labels.tolist() == [0, 1, 2]
