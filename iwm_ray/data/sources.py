"""From a listing to rows: where the bytes of every sample lie, its label and its stable name.

Three kinds of data end in the same table. Folders and tar shards are read where they are; the cells of
Parquet files are copied once, unchanged, into one flat file, because a cell can only be read together with
the page around it.
"""

import io
import json
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from iwm_ray.config import DataConfig
from iwm_ray.data.listing import IMAGE_SUFFIXES, Listing, Location, Progress, Shard, as_text, one_line
from iwm_ray.errors import UsageError

MAX_SAMPLE_BYTES = 1 << 28
"""encoded samples larger than this (256 MiB) are never loaded: one sparse file must not end a worker"""
MAX_CLASSES = 100_000
"""more different labels than this are captions or identifiers, not classes"""

_MAX_LABEL_BYTES = 1 << 20
_NUM_REMOTE_READERS = 8
_REMOTE_BUFFER = 1 << 23
_COMPRESSED_MAGICS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
# Few rows a batch: the cells of a hostile file may be MAX_SAMPLE_BYTES each, and honest ones lose no time.
_PARQUET_BATCH_ROWS = 8
_DEFAULT_LABEL_COLUMN = DataConfig.model_fields["label_column"].default


@dataclass(frozen=True)
class Rows:
    """One entry per sample, in the order of the index."""

    row_ids: pa.LargeStringArray
    """stable names, one line of UTF-8 each"""
    raw_names: pa.BinaryArray
    """file names in bytes where `row_ids` cannot show them, else null"""
    labels: NDArray[np.int32]
    """class numbers; -1: no label"""
    class_names: tuple[str, ...]
    """name of each class number"""
    shards: NDArray[np.int32]
    """number of the shard that holds the sample; 0 for folders"""
    offsets: NDArray[np.int64]
    """first byte, in the shard or (Parquet) in the packed file; 0 for folders"""
    sizes: NDArray[np.int64]
    """bytes; 0: an empty file or cell"""
    skipped: int = 0
    """members of tar shards that are no images"""


def scan(listing: Listing, data: DataConfig, packed: BinaryIO, progress: Progress | None = None) -> Rows:
    """Reads what the index needs from every folder or shard.

    Args:
        listing: the data.
        data: names of the Parquet columns.
        packed: written to only for Parquet: the cells, one after another.
        progress: called with the number of samples so far.

    Raises:
        UsageError: a shard is damaged or lacks a column that was asked for.
    """
    if listing.kind == "images":
        return _scan_folders(listing)
    if listing.kind == "parquet":
        return _scan_parquet(listing, data, packed, progress)
    return _scan_tars(listing, progress)


def number_classes(values: pa.Array | pa.ChunkedArray) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """Turns labels into class numbers.

    Args:
        values: `[n]` int64 or strings. Null, negative and empty ones mean "no label".

    Returns:
        `[n]` int32 class numbers, -1 without label, and the class names: the different labels in ascending
        order (so that integers which are 0 .. K-1 already keep their values).

    Raises:
        ValueError: more than MAX_CLASSES different labels.
    """
    is_number = pa.types.is_integer(values.type)
    known = pc.greater_equal(values, 0) if is_number else pc.not_equal(values, "")
    classes = pc.unique(values.filter(known)).sort()
    if len(classes) > MAX_CLASSES:
        raise ValueError(f"{len(classes)} different labels, more than {MAX_CLASSES}: these are no classes")
    labels = pc.fill_null(pc.index_in(values, value_set=classes), -1)
    return labels.to_numpy(zero_copy_only=False).astype(np.int32), tuple(map(str, classes.to_pylist()))


# Folders


def _scan_folders(listing: Listing) -> Rows:
    """The first folder below the root names the class; images in the root have none."""
    counts = [len(folder.sizes) for folder in listing.folders]
    tops = [folder.name.split("/")[0] for folder in listing.folders]
    numbers, class_names = number_classes(pa.array(tops, pa.large_string()))
    num_rows = sum(counts)
    return Rows(
        row_ids=pa.concat_arrays([folder.row_ids for folder in listing.folders]),
        raw_names=pa.concat_arrays([folder.raw_names for folder in listing.folders]),
        labels=np.repeat(numbers, counts),
        class_names=class_names,
        shards=np.zeros(num_rows, np.int32),
        offsets=np.zeros(num_rows, np.int64),
        sizes=np.concatenate([folder.sizes for folder in listing.folders]),
    )


# Parquet


@dataclass(frozen=True)
class _Columns:
    """What is read from every Parquet file of a set."""

    image: str
    is_struct: bool
    """the bytes are the field `bytes` of the column"""
    label: str | None
    label_type: pa.DataType
    """int64 or large_string"""
    row_id: str | None


def _scan_parquet(listing: Listing, data: DataConfig, packed: BinaryIO, progress: Progress | None) -> Rows:
    columns, num_bytes = _common_columns(listing, data)
    space = os.fstatvfs(packed.fileno())
    if num_bytes > space.f_bavail * space.f_frsize:
        raise listing.root.refuse(
            f"holds {num_bytes / 1e9:.1f} GB, more than runtime.cache has free; give --runtime.cache DIR"
        )
    schema = pa.schema(
        {
            "name": pa.large_string(),
            "row_id": pa.large_string(),
            "label": columns.label_type,
            "size": pa.int64(),
        }
    )
    batches: list[pa.RecordBatch] = []
    counts: list[int] = []
    for shard in listing.shards:
        num_rows = 0
        for batch in _batches(listing.root, shard, columns):
            sizes = _pack(batch, columns, packed)
            names = [f"{shard.name}:{row}" for row in range(num_rows, num_rows + len(batch))]
            arrays = [names, *_row_ids_and_labels(listing.root, shard, batch, columns), sizes]
            batches.append(pa.record_batch([pa.array(array) for array in arrays], schema=schema))
            num_rows += len(batch)
        counts.append(num_rows)
        if progress is not None:
            progress(sum(counts))
    table = pa.Table.from_batches(batches, schema)
    sizes = table["size"].to_numpy()
    kept = np.where(sizes <= MAX_SAMPLE_BYTES, sizes, 0)
    numbers, class_names = _classes(listing, table["label"], f"data.label_column '{columns.label}'")
    return Rows(
        row_ids=_unique(table["row_id"], table["name"]),
        raw_names=pa.nulls(len(table), pa.binary()),
        labels=numbers,
        class_names=class_names,
        shards=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        offsets=np.cumsum(kept) - kept,
        sizes=sizes,
    )


def _unique(given: pa.ChunkedArray, names: pa.ChunkedArray) -> pa.LargeStringArray:
    """The rows' own names where they name every row and no two alike; else file name and row number."""
    whole = given.null_count == 0 and pc.count_distinct(given).as_py() == len(given)
    return (given if whole else names).combine_chunks()


def _classes(
    listing: Listing, values: pa.ChunkedArray, what: str
) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    try:
        return number_classes(values)
    except ValueError as error:
        raise listing.root.refuse(
            f"{what} has {error}; name another column, or none: --data.label-column ''"
        ) from None


def _common_columns(listing: Listing, data: DataConfig) -> tuple[_Columns, int]:
    """The columns of all files, which must agree, and the bytes that their images take at least."""
    first: _Columns | None = None
    num_bytes = 0
    for shard in listing.shards:
        with listing.root.open(shard.name) as stream:
            file = _open_parquet(listing.root, shard, stream)
            columns = _columns(listing.root, shard, file.schema_arrow, data)
            num_bytes += _column_bytes(file.metadata, columns.image)
        first = first or columns
        if columns != first:
            raise listing.root.refuse(f"{shard.name} has other columns than {listing.shards[0].name}")
    assert first is not None
    return first, num_bytes


def _column_bytes(metadata: pq.FileMetaData, name: str) -> int:
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    chunks = (group.column(number) for group in groups for number in range(group.num_columns))
    return sum(
        chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == name
    )


def _columns(root: Location, shard: Shard, schema: pa.Schema, data: DataConfig) -> _Columns:
    """Finds the columns of one file; every way in which they can be wrong is a UsageError."""
    image, label = data.image_column, data.label_column
    if image not in schema.names:
        raise root.refuse(
            f"data.image_column '{image}' is not in {schema.names} of {shard.name}; "
            "name the column with the encoded images"
        )
    is_struct, image_type = False, schema.field(image).type
    if pa.types.is_struct(image_type) and image_type.get_field_index("bytes") >= 0:
        is_struct, image_type = True, image_type.field("bytes").type
    if not _is_binary(image_type.value_type if pa.types.is_dictionary(image_type) else image_type):
        raise root.refuse(
            f"data.image_column '{data.image_column}' of {shard.name} has type "
            f"{schema.field(data.image_column).type}; needs binary, or a struct with a binary field `bytes`"
        )
    if label not in schema.names:
        if label not in ("", _DEFAULT_LABEL_COLUMN):
            raise root.refuse(
                f"data.label_column '{label}' is not in {schema.names} of {shard.name}; '' means no labels"
            )
        return _Columns(image, is_struct, None, pa.int64(), _row_id_column(schema))
    label_type = _label_type(schema.field(label).type)
    if label_type is None:
        raise root.refuse(
            f"data.label_column '{label}' of {shard.name} has type {schema.field(label).type}; "
            "needs integers or strings; '' means no labels"
        )
    return _Columns(image, is_struct, label, label_type, _row_id_column(schema))


def _is_binary(kind: pa.DataType) -> bool:
    tests = (
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
        pa.types.is_fixed_size_binary,
    )
    return any(test(kind) for test in tests)


def _is_string(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _label_type(kind: pa.DataType) -> pa.DataType | None:
    """The type in which labels are kept; None for types that are no labels."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if _is_string(kind):
        return pa.large_string()
    return (
        pa.int64()
        if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)
        else None
    )


def _row_id_column(schema: pa.Schema) -> str | None:
    if "row_id" not in schema.names:
        return None
    kind = schema.field("row_id").type
    return "row_id" if _is_string(kind) or pa.types.is_integer(kind) else None


def _open_parquet(root: Location, shard: Shard, stream: BinaryIO) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(
            stream, buffer_size=_REMOTE_BUFFER, pre_buffer=False
        )  # stream pages, not whole row groups
    except (pa.ArrowException, OSError) as error:
        raise _damaged(root, shard, error) from None


def _damaged(root: Location, shard: Shard, error: Exception) -> UsageError:
    return root.refuse(f"{shard.name} is damaged or cut short ({one_line(error)}); copy it again")


def _batches(root: Location, shard: Shard, columns: _Columns) -> Iterator[pa.RecordBatch]:
    image = f"{columns.image}.bytes" if columns.is_struct else columns.image
    names = [image, *(name for name in (columns.label, columns.row_id) if name is not None)]
    with root.open(shard.name) as stream:
        file = _open_parquet(root, shard, stream)
        try:
            yield from file.iter_batches(_PARQUET_BATCH_ROWS, columns=names, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(root, shard, error) from None


def _pack(batch: pa.RecordBatch, columns: _Columns, packed: BinaryIO) -> NDArray[np.int64]:
    """Appends the cells to `packed`, all but those too large. Returns `[rows]` sizes in bytes, 0 for null."""
    cells = batch.column(columns.image)
    cells = pc.struct_field(cells, "bytes") if columns.is_struct else cells
    cells = (cells.dictionary_decode() if pa.types.is_dictionary(cells.type) else cells).cast(
        pa.large_binary()
    )
    sizes = pc.fill_null(pc.binary_length(cells), 0).to_numpy(zero_copy_only=False)
    for row in np.flatnonzero((sizes > 0) & (sizes <= MAX_SAMPLE_BYTES)):
        packed.write(cells[row].as_buffer())
    return sizes


def _row_ids_and_labels(
    root: Location, shard: Shard, batch: pa.RecordBatch, columns: _Columns
) -> tuple[pa.Array, pa.Array]:
    nothing = pa.nulls(len(batch), pa.large_string())
    row_ids = nothing if columns.row_id is None else batch.column(columns.row_id).cast(pa.large_string())
    labels = nothing if columns.label is None else batch.column(columns.label)
    if pa.types.is_dictionary(labels.type):
        labels = labels.dictionary_decode()
    try:
        return row_ids, labels.cast(columns.label_type)
    except pa.ArrowInvalid as error:  # unsigned integers above 2**63
        raise root.refuse(f"data.label_column '{columns.label}' of {shard.name}: {one_line(error)}") from None


# Tar shards


@dataclass(frozen=True, slots=True)
class _Member:
    """An image in a tar shard."""

    name: str
    offset: int
    size: int
    label: int | str | None


def _scan_tars(listing: Listing, progress: Progress | None) -> Rows:
    members: list[_Member] = []
    counts: list[int] = []
    skipped = 0
    with ThreadPoolExecutor(_NUM_REMOTE_READERS) as threads:
        mapped = (
            map if listing.root.filesystem is None else threads.map
        )  # remote headers wait for the network
        for found, passed_over in mapped(lambda shard: _scan_tar(listing.root, shard), listing.shards):
            members += found
            skipped += passed_over
            counts.append(len(found))
            if progress is not None:
                progress(len(members))
    labels = _label_array([member.label for member in members])
    numbers, class_names = _classes(listing, labels, "the labels in .cls and .json files")
    shards = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    prefixes = (listing.shards[shard].name for shard in shards)
    names = [f"{prefix}/{as_text(member.name)}" for prefix, member in zip(prefixes, members, strict=True)]
    return Rows(
        row_ids=pa.array(names, pa.large_string()),
        raw_names=pa.nulls(len(members), pa.binary()),
        labels=numbers,
        class_names=class_names,
        shards=shards,
        offsets=np.array([member.offset for member in members], np.int64),
        sizes=np.array([member.size for member in members], np.int64),
        skipped=skipped,
    )


def _scan_tar(root: Location, shard: Shard) -> tuple[list[_Member], int]:
    """The images of one shard, with the label of their sample, and the number of members passed over.

    A sample is a run of members that share the name up to the first dot. Only .cls and .json are opened here,
    at most 1 MiB of them; anything else, pickles above all, stays unread.
    """
    found: list[_Member] = []
    skipped = 0
    with root.open(shard.name) as file:
        stream = (
            file if root.filesystem is None else io.BufferedReader(cast(io.RawIOBase, file), _REMOTE_BUFFER)
        )
        for _, sample in groupby(_regular_members(root, shard, stream), key=lambda member: _key(member.name)):
            label, images = None, []
            for member in sample:
                suffix = member.name.rpartition(".")[2].lower()
                if member.name.rpartition("/")[2].startswith("."):
                    skipped += 1
                elif suffix in IMAGE_SUFFIXES:
                    images.append(member)
                elif suffix in ("cls", "json") and member.size <= _MAX_LABEL_BYTES:
                    stream.seek(member.offset_data)
                    label = _parse_label(stream.read(member.size), suffix) if label is None else label
                else:
                    skipped += 1
            found += [_Member(image.name, image.offset_data, image.size, label) for image in images]
    return found, skipped


def _regular_members(root: Location, shard: Shard, stream: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yields the plain files of an archive, never links or sparse files; nothing is extracted."""
    if stream.read(6).startswith(_COMPRESSED_MAGICS):
        raise root.refuse(
            f"{shard.name} is a compressed tar, which has no random access; unpack it to a plain .tar"
        )
    stream.seek(0)
    try:
        archive = tarfile.open(fileobj=stream, mode="r:")  # noqa: SIM115 - it owns nothing: the caller closes the stream
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # else it keeps every header it has seen
            if member.isreg() and not member.issparse():
                yield member
        # tarfile takes a damaged header, and a cut between two members, for the end of the archive.
        stream.seek(archive.offset)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no header and no end mark at byte {archive.offset}")
    except (tarfile.TarError, OSError) as error:
        raise _damaged(root, shard, error) from None


def _key(name: str) -> str:
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"


def _parse_label(content: bytes, suffix: str) -> int | str | None:
    """The label in a .cls file (text) or a .json file ({"label": ...}); None where there is none to read."""
    try:
        if suffix == "cls":
            return content.decode("utf-8").strip()
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return None
    label = tree.get("label") if isinstance(tree, dict) else None
    return label if isinstance(label, int | str) else None


def _label_array(labels: list[int | str | None]) -> pa.Array:
    """Integers where every label is one, also if written as text; else strings."""
    texts = pa.array([None if label is None else str(label) for label in labels], pa.large_string())
    try:
        return texts.cast(pa.int64())
    except pa.ArrowInvalid:
        return texts
