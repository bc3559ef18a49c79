"""`python -m iwm_ray.evaluate RUN`: is this a world model, and is its representation good?

Every figure stands beside what untrained weights score and beside chance, with its 95 % interval.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from iwm_ray import cli
from iwm_ray.driver import require_ray
from iwm_ray.errors import UsageError
from iwm_ray.evaluation.settings import EvaluateConfig, MeasureConfig
from iwm_ray.evaluation.table import table_lines
from iwm_ray.progress import duration
from iwm_ray.run_directory import RunDirectory

if TYPE_CHECKING:
    from iwm_ray.measurement import Measurement, TaskResult
    from iwm_ray.runtime.measure import Progress
    from iwm_ray.trained import Trained

_SECONDS_BETWEEN_LINES = 5.0
# What is tracked of untrained weights and other encoders; everything is in the files.
_HEADLINES = ("mrr/mrr", "action_r2/mean", "rank/rankme", "knn/top1", "linear/top1", "attentive/top1")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits with its code."""
    sys.exit(cli.run_command(_main, sys.argv[1:] if arguments is None else arguments))


def _main(arguments: Sequence[str]) -> None:
    options = _parser().parse(arguments)
    from iwm_ray.trained import Trained

    trained = Trained.open(options.run, options.checkpoint)
    config = read_config(trained, options)
    measurement = open_measurement(trained, config, options.cheap)
    if options.dry_run:
        print("\n".join(plan_lines(measurement)))
        return
    results: list[TaskResult] = []
    try:
        for task in measurement.settings.tasks:
            results.append(measurement.run(task))
    finally:  # what is measured is shown, also where a later task fails
        if results:
            _finish(trained, config, measurement, results, options.cheap)


def _finish(
    trained: "Trained",
    config: EvaluateConfig,
    measurement: "Measurement",
    results: Sequence["TaskResult"],
    cheap: bool,
) -> None:
    if cheap or config.data != trained.config.data:
        print("not tracked: cheap figures, or of other data than the run's own", file=sys.stderr)
    else:
        track(trained, config, results)
    print("\n".join(table_lines(together(results))))
    for result in results:
        print(f"{result.task:12} {result.images}, {duration(result.seconds)}")
    print(f"results      {measurement.folder}")


def _parser() -> cli.Parser:
    parser = cli.Parser(
        prog="python -m iwm_ray.evaluate",
        description="Measure a trained world model and its representation. Results that are there are not computed again.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help=cli.RUN)
    parser.add_argument(
        "--checkpoint", default="newest", metavar="WHICH", help="newest, best, or the step of a kept one"
    )
    parser.add_argument(
        "--cheap", action="store_true", help="a thirtieth of the work, for use while a run trains"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan, measure nothing"
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="the same as --measure.tasks")
    cli.add_common_options(parser)
    cli.add_settings(parser, EvaluateConfig)
    return parser


def read_config(trained: "Trained", options: argparse.Namespace) -> EvaluateConfig:
    """The configuration of the command line over the run's own data, cache and tracking.

    Raises:
        UsageError: a value is wrong.
    """
    run, chosen = trained.config, vars(options)
    tree = EvaluateConfig(measure=MeasureConfig.cheap() if options.cheap else MeasureConfig()).model_dump()
    tree["data"], tree["tracking"] = run.data.model_dump(), run.tracking.model_dump()
    tree["runtime"]["cache"] = run.runtime.cache
    if "data.path" in chosen:  # the run's own test images are of other training images
        tree["data"]["test_path"] = ""
    cli.override(tree, options)
    if options.tasks:
        tree["measure"]["tasks"] = options.tasks
    return cli.validate_as(EvaluateConfig, tree)


def open_measurement(trained: "Trained", config: EvaluateConfig, cheap: bool = False) -> "Measurement":
    """Opens the images and, for engine ray, the cluster; results of cheap evaluations have a folder of their own.

    Raises:
        UsageError: images, encoders or resources that are not there.
    """
    from iwm_ray.data.decode import DecodeLimits
    from iwm_ray.data.index import Index
    from iwm_ray.data.read import content_hash
    from iwm_ray.measurement import Measurement, results_folder
    from iwm_ray.progress import scanning

    cache = Path(config.runtime.cache).expanduser().absolute()
    if not config.data.path:
        raise UsageError("data.path is empty; give --data.path and, for probes, --data.test-path")
    train = Index.open(config.data, config.data.path, cache, scanning(config.data.path))
    test = None
    if config.data.test_path:
        test = Index.open(config.data, config.data.test_path, cache, scanning(config.data.test_path))
    if config.runtime.engine == "ray":
        _connect(trained, config)
    measurement = Measurement(
        trained,
        config.measure,
        config.runtime.model_copy(update={"cache": str(cache)}),
        DecodeLimits.from_config(config.data),
        train,
        test,
        results_folder(
            trained, cheap, "" if config.data == trained.config.data else content_hash(test or train)
        ),
        _Progress(),
    )
    _ = measurement.encoders  # a wrong name is found before anything is measured
    measurement.check(config.measure.tasks)
    return measurement


def _connect(trained: "Trained", config: EvaluateConfig) -> None:
    require_ray("runtime.engine ray")
    from iwm_ray.runtime import cluster

    asked = trained.config.model_copy(update={"runtime": config.runtime})
    cluster.preflight(asked)
    cluster.connect(asked)


def plan_lines(measurement: "Measurement") -> list[str]:
    """What `--dry-run` prints."""
    settings, trained = measurement.settings, measurement.trained
    banks = settings.images * settings.views * (1 + 4 * settings.components)
    return [
        f"plan of {measurement.folder}",
        f"  model      {trained.path}",
        f"  tasks      {' '.join(settings.tasks)}",
        f"  images     {len(measurement.train):,} training, "
        + (f"{len(measurement.test):,} test" if measurement.test else "a fifth of them held out for testing"),
        f"  views      {banks:,} to encode for MRR" + ", twice: trained and untrained" * settings.untrained,
        f"  encoders   {', '.join(encoder.name for encoder in measurement.encoders.values())}",
    ]


def together(results: Sequence["TaskResult"]) -> dict[str, dict[str, float]]:
    """Subject -> all its figures."""
    found: dict[str, dict[str, float]] = {}
    for result in results:
        for subject, metrics in result.measured.items():
            found.setdefault(subject, {}).update(metrics)
    return found


def track(trained: "Trained", config: EvaluateConfig, results: Sequence["TaskResult"]) -> None:
    """Adds the figures to the run's metrics, and so to its MLflow run."""
    from iwm_ray import summary
    from iwm_ray.measurement import TRAINED
    from iwm_ray.runtime.tracking import reopened
    from iwm_ray.training.metrics_log import MetricsLog

    run = RunDirectory(trained.run.path)
    tracked = trained.config.model_copy(update={"tracking": config.tracking})
    try:
        with reopened(run, tracked) as tracker:
            figures = together(results)
            metrics = figures[TRAINED]
            for subject in figures.keys() - {TRAINED}:
                metrics = metrics | {
                    f"{subject}/{name}": value
                    for name, value in figures[subject].items()
                    if name in _HEADLINES
                }
            MetricsLog(run.metrics).correct(trained.step, metrics)
            summary.renew(run)
            for file in sorted((run.path / "evaluation").rglob("*.*")):
                tracker.log_file(file, f"evaluation/{file.parent.name}")
    except UsageError as error:  # the run is still training, and its directory is its own
        print(f"not tracked: {error}", file=sys.stderr)


class _Progress:
    """Prints a line now and then: task, subject, share done, time left."""

    def __call__(self, task: str, subject: str) -> "Progress":
        begin, shown = time.monotonic(), [time.monotonic()]

        def show(done: int, total: int) -> None:
            now = time.monotonic()
            if now - shown[0] < _SECONDS_BETWEEN_LINES:
                return
            shown[0] = now
            left = (now - begin) * (total - done) / max(done, 1)
            print(f"{task}, {subject}: {done:,} of {total:,}, {left:.0f} s left", file=sys.stderr, flush=True)

        return show


if __name__ == "__main__":
    main()
