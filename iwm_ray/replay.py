"""`python -m iwm_ray.replay RUN --epoch E --row ID`: rebuilds one logged sample, bit for bit, and draws it."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iwm_ray import action_log, cli
from iwm_ray.build import Setup, build
from iwm_ray.errors import RunError, UsageError
from iwm_ray.feed import Columns, checksums_of
from iwm_ray.pictures.words import amount
from iwm_ray.run_directory import RunDirectory, read_config
from iwm_ray.session import draw_views


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits with its code."""
    sys.exit(cli.run_command(_main, sys.argv[1:] if arguments is None else arguments))


def _main(arguments: Sequence[str]) -> None:
    parser = cli.Parser(prog="python -m iwm_ray.replay", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--epoch", type=int, required=True, metavar="E", help="pass over the data, from 0")
    parser.add_argument("--row", required=True, metavar="ID", help="row_id of the action log")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="picture; default RUN/pictures/replay-<E>-<ID>.png"
    )
    cli.add_common_options(parser)
    options = parser.parse(arguments)
    run = RunDirectory(options.run)
    config = read_config(run.path)
    row = find_row(run, options.epoch, options.row)
    setup = build(config, run)
    columns = rebuild(setup, row)
    output = options.output or run.pictures / f"replay-{options.epoch}-{_file_name(options.row)}.png"
    _draw(setup, row, output)
    print(f"row {options.row} of epoch {options.epoch}, step {row['step']}: rebuilt bit for bit")
    for field, value in zip(setup.policy.schema, columns["action"][0], strict=True):
        print(f"  {field.name:12} {value:+.4f}  {amount(float(value), field)}")
    print(f"  picture      {output}")


def find_row(run: RunDirectory, epoch: int, row_id: str) -> dict[str, Any]:
    """The logged row of a sample in an epoch.

    Raises:
        UsageError: it is not in the log.
    """
    found = action_log.read(run.actions, epoch, row_id)
    if found.num_rows:
        return dict(found.slice(0, 1).to_pylist()[0])
    rows = action_log.read(run.actions, epoch)
    if not rows.num_rows:
        raise UsageError(
            f"--epoch {epoch}: nothing logged for it under {run.actions}; see its epoch=* folders"
        )
    ids = rows["row_id"].to_pylist()
    hint = cli.suggest(row_id, ids)
    raise UsageError(f"--row {row_id!r}: not among the {len(ids)} logged rows of epoch {epoch}{hint}")


def rebuild(setup: Setup, row: dict[str, Any]) -> Columns:
    """The training columns of a logged row, made again from the image and the seed and compared with the log.

    Raises:
        RunError: the image, the code or the configuration is not what it was: names the first difference.
    """
    if row["error"]:
        raise RunError(f"row {row['row_id']} was quarantined ({row['error']}); there are no views to rebuild")
    feed = setup.feed
    counter = np.array([row["counter"]], np.int64)
    sample = int(feed.plan.samples(counter)[0])
    if feed.index.row_id(sample) != row["row_id"]:
        raise RunError(
            f"row {row['row_id']}: place {row['counter']} of the stream is now row {feed.index.row_id(sample)}; the "
            f"seed or the images under {setup.config.data.path} are not those of the run"
        )
    columns = replace(feed, log=None, quarantine=None).rows(counter)
    if not columns["weight"][0]:
        raise RunError(f"row {row['row_id']}: the image can't be decoded any more: {feed.index.path(sample)}")
    masks = feed.masks.draw(setup.config.seed, _epochs(row), np.array([sample]))
    found = {"action": columns["action"][0], "mask_blocks": masks.blocks[0]}
    views = [view for view in ("source", "target", "crop") if view in columns]
    found |= {f"{view}_checksum": checksums_of(columns[view])[0] for view in views}
    for name, value in found.items():
        if not np.array_equal(value, np.asarray(row[name], value.dtype)):
            raise RunError(
                f"row {row['row_id']}: {name} is {_short(value)}, the log says {_short(row[name])}; the image, the "
                "configuration or the code is not that of the run"
            )
    return columns


def _draw(setup: Setup, row: dict[str, Any], output: Path) -> None:
    title = f"{row['row_id']}, epoch {row['epoch']}, step {row['step']}"
    figure = draw_views(setup, _epochs(row), np.array([row["sample"]]), title)
    try:
        figure.savefig(output, dpi=150)
    except OSError as error:
        raise UsageError(f"--output {output}: {error.strerror}; choose another --output") from None
    except ValueError as error:  # a kind of picture that matplotlib does not know
        raise UsageError(f"--output {output}: {str(error).partition(';')[0]}; end its name in .png") from None


def _epochs(row: dict[str, Any]) -> NDArray[np.int64]:
    return np.array([row["epoch"]], np.int64)


def _short(value: Any) -> str:
    return " ".join(str(np.asarray(value)).split())


def _file_name(row_id: str) -> str:
    plain = "".join(character if character.isalnum() or character in "-_." else "_" for character in row_id)
    return plain.removesuffix(".png")[-80:]


if __name__ == "__main__":
    main()
