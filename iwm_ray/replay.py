"""`python -m iwm_ray.replay RUN --epoch E --row ID`: rebuilds one logged sample, bit for bit, and draws it."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iwm_ray import action_log, cli
from iwm_ray.build import Setup, build
from iwm_ray.errors import RunError, UsageError
from iwm_ray.feed import Columns, checksums_of
from iwm_ray.pictures.sheets import ViewsExample, views_sheet
from iwm_ray.run_directory import RunDirectory, read_config


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits with its code."""
    sys.exit(cli.run_command(_main, sys.argv[1:] if arguments is None else arguments))


def _main(arguments: Sequence[str]) -> None:
    parser = cli.Parser(prog="python -m iwm_ray.replay", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--epoch", type=int, required=True, metavar="E", help="pass over the data, from 0")
    parser.add_argument("--row", required=True, metavar="ID", help="row_id of the action log")
    parser.add_argument("--output", type=Path, metavar="FILE", help="picture; default RUN/pictures/replay-<E>-<ID>.png")
    cli.add_common_options(parser)
    options = parser.parse(arguments)
    run = RunDirectory(options.run)
    row = find_row(run, options.epoch, options.row)
    setup = build(read_config(run.path), run)
    columns = rebuild(setup, row)
    output = options.output or run.pictures / f"replay-{options.epoch}-{_file_name(options.row)}.png"
    _draw(setup, row, columns, output)
    print(f"row {options.row} of epoch {options.epoch}, step {row['step']}: rebuilt bit for bit")
    for field, value in zip(setup.policy.schema, columns["action"][0], strict=True):
        print(f"  {field.name:12} {value:+.4f} x {field.scale:g} {field.unit}")
    print(f"  picture      {output}")


def find_row(run: RunDirectory, epoch: int, row_id: str) -> dict[str, Any]:
    """The logged row of a sample in an epoch.

    Raises:
        UsageError: it is not in the log.
    """
    rows = action_log.read(run.actions, epoch)
    if not rows.num_rows:
        raise UsageError(f"--epoch {epoch}: nothing logged for it under {run.actions}; see its epoch=* folders")
    ids = rows["row_id"].to_pylist()
    if row_id not in ids:
        hint = cli.suggest(row_id, ids)
        raise UsageError(f"--row {row_id!r}: not among the {len(ids)} logged rows of epoch {epoch}{hint}")
    return dict(rows.slice(ids.index(row_id), 1).to_pylist()[0])


def rebuild(setup: Setup, row: dict[str, Any]) -> Columns:
    """The training columns of a logged row, made again from the image and the seed and compared with the log.

    Raises:
        RunError: the image, the code or the data set is not what it was: names the first difference.
    """
    if row["error"]:
        raise RunError(f"row {row['row_id']} was quarantined ({row['error']}); there are no views to rebuild")
    feed = setup.feed
    counter = np.array([row["counter"]], np.int64)
    if setup.feed.plan.samples(counter)[0] != row["sample"] or feed.index.row_id(row["sample"]) != row["row_id"]:
        raise RunError(f"row {row['row_id']}: the data set under {setup.config.data.path} is not the one of the run")
    columns = type(feed)(**{**vars(feed), "log": None, "quarantine": None}).rows(counter)
    found = {f"{view}_checksum": checksums_of(columns[view]) for view in ("source", "target", "crop") if view in columns}
    found["action"] = columns["action"]
    for name, value in found.items():
        if not np.array_equal(np.asarray(value[0]), np.asarray(row[name], value.dtype)):
            raise RunError(f"row {row['row_id']}: {name} is {value[0]}, the log says {row[name]}; the image has changed")
    return columns


def _draw(setup: Setup, row: dict[str, Any], columns: Columns, output: Path) -> None:
    from iwm_ray.loader import to_batch, to_tensors

    batch = to_batch(to_tensors(columns), setup.policy, __import__("torch").device("cpu"))
    raise NotImplementedError


def _file_name(row_id: str) -> str:
    return "".join(character if character.isalnum() or character in "-_." else "_" for character in row_id)[-80:]


if __name__ == "__main__":
    main()
