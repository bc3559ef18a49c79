"""`python -m iwm_ray.predict ADAPTER --data.path IMAGES --output FILE.parquet`: classes for a whole data set.

A segmenter writes masks: as a column of the file, or into a new folder, `--output DIR`.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iwm_ray import cli
from iwm_ray.errors import UsageError
from iwm_ray.output import new_output

if TYPE_CHECKING:
    import pyarrow as pa

    from iwm_ray.data.decode import DecodeLimits
    from iwm_ray.data.index import Index
    from iwm_ray.prediction import PredictConfig, Predictor

_SECONDS_BETWEEN_LINES = 5.0
_NUM_PICTURED, _PICTURE_SIDE = 6, 224


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits with its code."""
    sys.exit(cli.run_command(_main, sys.argv[1:] if arguments is None else arguments))


def _main(arguments: Sequence[str]) -> None:
    import iwm_ray
    from iwm_ray.build import cache_folder
    from iwm_ray.data.decode import DecodeLimits
    from iwm_ray.data.index import Index
    from iwm_ray.prediction import Labels, Masks, PredictConfig, Predictor
    from iwm_ray.progress import scanning
    from iwm_ray.segmentation.segmenter import Segmenter

    options = _parser(PredictConfig).parse(arguments)
    adapter = iwm_ray.find_adapter(options.adapter)
    # Here too, so that what is wrong with it is said before Ray starts.
    model = iwm_ray.load(adapter, options.task, options.run)
    is_segmenter = isinstance(model, Segmenter)
    output = _checked(options.output, is_segmenter)
    config = _read_config(options, model.trained.config.runtime.cache)
    names = model.class_names
    if is_segmenter and options.top is not None:
        raise UsageError(f"--top {options.top}: {adapter} is a segmenter, which gives masks; drop --top")
    answers = Masks(names) if is_segmenter else Labels(names, _top(options.top or "5", len(names)))
    asked = model.trained.config.model_copy(update={"runtime": config.runtime})
    index = Index.open(config.data, config.data.path, cache_folder(asked), scanning(config.data.path))
    if config.runtime.engine == "ray":
        from iwm_ray.runtime import cluster

        cluster.preflight(asked)
        cluster.connect(asked)
    limits = DecodeLimits.from_config(config.data)
    predictor = Predictor(adapter, options.task, options.run, answers, index, limits, config.runtime)
    kept = _write(predictor, output, _NUM_PICTURED if is_segmenter else 0)
    if kept:
        print(f"picture      {_draw(kept, names, index, limits, output)}")


def _read_config(options: argparse.Namespace, cache: str) -> "PredictConfig":
    """The configuration of the command line, with the run's own cache unless another is given."""
    from iwm_ray.driver import require_ray
    from iwm_ray.prediction import PredictConfig

    tree = PredictConfig().model_dump()
    tree["runtime"]["cache"] = cache
    cli.override(tree, options)
    config = cli.validate_as(PredictConfig, tree)
    if not config.data.path:
        raise UsageError(
            "--data.path is missing: give a folder of images, Parquet file(s) or WebDataset shards"
        )
    if config.runtime.engine == "ray":
        require_ray("runtime.engine ray")
    return config


def _write(predictor: "Predictor", output: Path, num_kept: int) -> list[Any]:
    """Predicts, writes and says what was written; gives the first rows with a mask, as many as asked for."""
    from iwm_ray.prediction import QUARANTINE, write, write_masks

    kept: list[Any] = []
    tables = predictor.rows(_Progress())
    if num_kept:
        tables = _keeping(tables, kept, num_kept)
    is_file, begin = output.suffix == ".parquet", time.monotonic()
    written = write(tables, predictor.answers.schema, output) if is_file else write_masks(tables, output)
    seconds = time.monotonic() - begin
    print(f"predicted    {written.images:,} images, {written.images / seconds:,.0f} images/s")
    if written.unreadable:
        where = "column error" if is_file else output / QUARANTINE
        print(f"unreadable   {written.unreadable:,} of them; {where} says why")
    print(f"written      {output}")
    return kept


def _keeping(tables: "Iterator[pa.Table]", kept: list[Any], count: int) -> "Iterator[pa.Table]":
    """Passes tables on and keeps the first rows that have a mask, for the picture."""
    for table in tables:
        kept += [row for row in table.to_pylist() if row["mask"] is not None][: count - len(kept)]
        yield table


def _draw(
    rows: list[Any], names: tuple[str, ...], index: "Index", limits: "DecodeLimits", output: Path
) -> Path:
    """The first images beside their masks."""
    import io

    import numpy as np
    from PIL import Image

    from iwm_ray.data.decode import decode
    from iwm_ray.data.read import Reader
    from iwm_ray.pictures.segmentation import segmentation_sheet
    from iwm_ray.segmentation.data import nearest
    from iwm_ray.views.resize import resize

    images, masks, reader = [], [], Reader(index)
    for row in rows:
        images.append(resize(decode(reader.read(index.find(row["row_id"])), limits), _PICTURE_SIDE))
        with Image.open(io.BytesIO(row["mask"])) as mask:
            masks.append(nearest(np.array(mask), _PICTURE_SIDE, _PICTURE_SIDE))
    path = output.with_name(f"{output.stem}-overview.png")
    predicted = {"predicted": np.stack(masks).astype(np.int64)}
    segmentation_sheet(np.stack(images), None, predicted, names, output.stem).savefig(path)
    return path


def _parser(kind: type["PredictConfig"]) -> cli.Parser:
    parser = cli.Parser(
        prog="python -m iwm_ray.predict",
        description="Classify every image of a data set, or, by a segmenter, each of its pixels; one row for each image, "
        "with row_id, path, class, probability, top_classes, top_probabilities (a segmenter's: mask, classes, shares), or "
        "error where it cannot be decoded.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help=cli.ADAPTER)
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE.parquet",
        help="new file; of a segmenter also a new folder",
    )
    cli.add_adapter_options(parser)
    parser.add_argument("--top", metavar="K", help="classes of each image, the likeliest first; default 5")
    cli.add_common_options(parser)
    cli.add_settings(parser, kind)
    return parser


def _checked(output: Path, is_segmenter: bool) -> Path:
    if output.suffix != ".parquet" and (output.suffix or not is_segmenter):
        more = ", or of a new folder" if is_segmenter else ""
        raise UsageError(f"--output {output}: give the name of a new file that ends in .parquet{more}")
    return new_output(output, is_file=output.suffix == ".parquet")


def _top(word: str, num_classes: int) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise UsageError(f"--top {word}: give a number of 1 or more")
    return min(int(word), num_classes)


class _Progress:
    """Prints a line now and then."""

    def __init__(self) -> None:
        self._begin = self._shown = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._shown < _SECONDS_BETWEEN_LINES:
            return
        self._shown = now
        left = (now - self._begin) * (total - done) / done
        print(f"{done:,} of {total:,} parts, {left:.0f} s left", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
