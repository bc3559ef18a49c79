"""The action log: one Parquet row for each sample seen, written by the task that made its views.

A block of the stream is one file, named by its first counter: a task that runs twice writes the same file again, so that
no fault can double a row. `read` gives the rows of a run, ready for pandas or DuckDB.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
from numpy.typing import NDArray

SCHEMA_VERSION = 1
_LOSSES = "_losses"  # pyarrow passes over such names when it reads the folder as a data set


@dataclass(frozen=True)
class ActionLog:
    """Where and how much of the stream is logged."""

    folder: Path
    run: str
    fraction: float
    """share of the blocks that are logged, spread evenly by a hash of their first counter"""

    def wants(self, first_counter: int) -> bool:
        """Whether the block that starts at `first_counter` is logged; the same answer in every task."""
        digest = hashlib.blake2b(str(first_counter).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self.fraction * 2**64

    def write(self, columns: dict[str, NDArray[Any] | Sequence[Any]]) -> None:
        """Writes one block, a file for each epoch that it touches, whole or not at all."""
        table = pa.table(
            {"run": [self.run] * len(columns["counter"])} | {n: _column(v) for n, v in columns.items()}
        )
        table = table.replace_schema_metadata({"iwm_ray.action_log": str(SCHEMA_VERSION)})
        epochs = np.asarray(columns["epoch"])
        for epoch in np.unique(epochs):
            rows = table.filter(pa.array(epochs == epoch))
            folder = self.folder / f"epoch={int(epoch):05d}"
            folder.mkdir(parents=True, exist_ok=True)
            name = f"rows-{rows['counter'][0].as_py():012d}.parquet"
            partial = folder / f".{name}.{os.getpid()}"
            # Dictionaries and statistics cost more than they save on blocks this small.
            pa.parquet.write_table(
                rows.drop_columns("epoch"),
                partial,
                compression="zstd",
                use_dictionary=False,
                write_statistics=False,
            )
            partial.replace(folder / name)


def write_losses(folder: Path, step: int, rank: int, losses: dict[str, NDArray[Any]]) -> None:
    """Writes the losses that a train worker has noted up to a step: `counter` and `loss`, of any length."""
    (folder / _LOSSES).mkdir(parents=True, exist_ok=True)
    name = f"losses-{step:08d}-{rank:05d}.parquet"
    partial = folder / _LOSSES / f".{name}.{os.getpid()}"
    pa.parquet.write_table(pa.table(losses), partial)
    partial.replace(folder / _LOSSES / name)


def read(folder: Path, epoch: int | None = None, row_id: str | None = None) -> pa.Table:
    """The logged rows in the order of the stream, each counter once.

    `loss` is the training loss of the sample where it is known: in the steps that were reported.

    Args:
        folder: a run's `actions` folder.
        epoch: this epoch alone; None: all.
        row_id: this sample alone; None: all.
    """
    files = sorted(
        folder.glob("epoch=*/rows-*.parquet" if epoch is None else f"epoch={epoch:05d}/rows-*.parquet")
    )
    if not files:
        return pa.table({"counter": pa.array([], pa.int64())})
    partitioning = pa.dataset.partitioning(pa.schema([("epoch", pa.int32())]), flavor="hive")
    dataset = pa.dataset.dataset(files, partitioning=partitioning, partition_base_dir=str(folder))
    wanted = None if row_id is None else pa.dataset.field("row_id") == row_id
    table = dataset.to_table(filter=wanted).sort_by("counter")
    counters = table["counter"].to_numpy()
    # Blocks of another length, after a change of the worker count, can overlap.
    table = table.filter(pa.array(np.diff(counters, prepend=-1) != 0))
    return table.append_column("loss", _losses_of(folder, table["counter"].to_numpy()))


def _losses_of(folder: Path, counters: NDArray[np.int64]) -> pa.Array:
    """`[n]` float32, null where no loss is known."""
    files = sorted((folder / _LOSSES).glob("losses-*.parquet"))
    if not files:
        return pa.nulls(len(counters), pa.float32())
    counter = pa.dataset.field("counter")
    # Of a long run only what belongs to these rows.
    wanted = (counter >= counters[0]) & (counter <= counters[-1]) if len(counters) else None
    noted = pa.dataset.dataset(files).to_table(filter=wanted)
    if not noted.num_rows:
        return pa.nulls(len(counters), pa.float32())
    # Steps done again after a fault have the same losses again.
    known, first = np.unique(noted["counter"].to_numpy(), return_index=True)
    places = np.searchsorted(known, counters).clip(max=len(known) - 1)
    return pa.array(noted["loss"].to_numpy()[first[places]], mask=known[places] != counters)


def _column(values: NDArray[Any] | Sequence[Any]) -> pa.Array:
    if not isinstance(values, np.ndarray) or values.ndim == 1:
        return pa.array(values)
    if values.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(
            pa.array(np.ascontiguousarray(values).ravel()), values.shape[1]
        )
    inner = _column(values.reshape(-1, *values.shape[2:]))
    return pa.FixedSizeListArray.from_arrays(inner, values.shape[1])
