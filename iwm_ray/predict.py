"""`python -m iwm_ray.predict ADAPTER --data.path IMAGES --output FILE.parquet`: classes for a whole data set."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from iwm_ray import cli
from iwm_ray.errors import UsageError

if TYPE_CHECKING:
    from iwm_ray.prediction import PredictConfig

_SECONDS_BETWEEN_LINES = 5.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits with its code."""
    sys.exit(cli.run_command(_main, sys.argv[1:] if arguments is None else arguments))


def _main(arguments: Sequence[str]) -> None:
    from iwm_ray.build import cache_folder
    from iwm_ray.data.decode import DecodeLimits
    from iwm_ray.data.index import Index
    from iwm_ray.finetuning.adapter import load, trained_of
    from iwm_ray.prediction import PredictConfig, Predictor, write
    from iwm_ray.progress import scanning

    options = _parser(PredictConfig).parse(arguments)
    adapter, output = options.adapter.expanduser().absolute(), _checked(options.output)
    classifier = load(adapter, options.task)  # what is wrong with it is said before Ray starts
    trained = trained_of(adapter)
    tree = PredictConfig().model_dump()
    tree["runtime"]["cache"] = trained.config.runtime.cache
    cli.override(tree, options)
    config = cli.validate_as(PredictConfig, tree)
    if not config.data.path:
        raise UsageError(
            "--data.path is missing: give a folder of images, Parquet file(s) or WebDataset shards"
        )
    top = _top(options.top, len(classifier.class_names))
    asked = trained.config.model_copy(update={"runtime": config.runtime})
    index = Index.open(config.data, config.data.path, cache_folder(asked), scanning(config.data.path))
    if config.runtime.engine == "ray":
        from iwm_ray.runtime import cluster

        cluster.preflight(asked)
        cluster.connect(asked)
    limits = DecodeLimits.from_config(config.data)
    predictor = Predictor(adapter, options.task, index, limits, config.runtime, top)
    begin = time.monotonic()
    written = write(predictor.rows(classifier.class_names, _Progress()), output)
    seconds = time.monotonic() - begin
    print(f"predicted    {written.images:,} images, {written.images / seconds:,.0f} images/s")
    if written.unreadable:
        print(f"unreadable   {written.unreadable:,} of them; column error says why")
    print(f"written      {output}")


def _parser(kind: type["PredictConfig"]) -> cli.Parser:
    parser = cli.Parser(
        prog="python -m iwm_ray.predict",
        description="Classify every image of a data set by an adapter; one row for each image, with row_id, path, class, "
        "probability, top_classes, top_probabilities, or error where it cannot be decoded.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="RUN/finetune/NAME/adapters/ARM")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.parquet", help="new file")
    parser.add_argument("--task", default="", help="of an adapter with several")
    parser.add_argument("--top", default="5", metavar="K", help="classes of each image, the likeliest first")
    cli.add_common_options(parser)
    cli.add_settings(parser, kind)
    return parser


def _checked(output: Path) -> Path:
    output = output.expanduser().absolute()
    if output.suffix != ".parquet":
        raise UsageError(f"--output {output}: give the name of a new file that ends in .parquet")
    if output.exists():
        raise UsageError(f"--output {output}: is there already; choose another --output")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {output}: {error.strerror}; choose another --output") from None
    return output


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
