"""`python -m iwm_ray.finetune RUN --data.path TRAIN --data.test-path TEST`: tunes a trained model for tasks.

Predictor finetuning with its control, encoder finetuning, end-to-end; several data sets make it multi-task. The same
command again runs what is not finished. Runs in this process.
"""

import importlib.util
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iwm_ray import cli
from iwm_ray.config import RuntimeConfig
from iwm_ray.errors import UsageError
from iwm_ray.finetuning.settings import FinetuneConfig
from iwm_ray.progress import duration
from iwm_ray.run_directory import RunDirectory, write_json

if TYPE_CHECKING:
    from iwm_ray.finetuning.arms import Arm
    from iwm_ray.finetuning.experiment import Experiment, Extract
    from iwm_ray.trained import Trained

_SECONDS_BETWEEN_LINES = 10.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits with its code."""
    sys.exit(cli.run_command(_main, sys.argv[1:] if arguments is None else arguments))


def _main(arguments: Sequence[str]) -> None:
    options = _parser().parse(arguments)
    config = cli.tuning_config(options, FinetuneConfig)
    from iwm_ray.finetuning.experiment import Experiment
    from iwm_ray.trained import Trained

    trained = Trained.open(options.run, options.checkpoint)
    experiment = Experiment.open(trained, config, options.output, extract_with(trained, config))
    if options.dry_run:
        print("\n".join(plan_lines(experiment)))
        return
    finetune(experiment)


def _parser() -> cli.Parser:
    description = (
        "Tune a trained world model for one or several labelled data sets. Several data sets are given as NAME=PATH words "
        "behind --data.path and, in the same order, behind --data.test-path."
    )
    return cli.tuning_parser("finetune", description, FinetuneConfig, "<tasks>-<hash>")


def extract_with(trained: "Trained", config: FinetuneConfig) -> "Extract":
    """Tokens by the measuring runtime, which keeps them on the disk for the next finetuning."""
    import torch

    from iwm_ray.evaluation.encoders import LAST, RunEncoder
    from iwm_ray.evaluation.features import Features
    from iwm_ray.finetuning.data import ImageRows
    from iwm_ray.finetuning.experiment import cache_of
    from iwm_ray.runtime.measure import extract

    use_gpu = config.runtime.device == "cuda" or (
        config.runtime.device == "auto" and torch.cuda.is_available()
    )
    runtime = RuntimeConfig(engine="local", use_gpu=use_gpu, precision=config.runtime.precision)

    def make(encoder: RunEncoder, rows: ImageRows) -> Features:
        found = extract(
            encoder,
            rows.index,
            rows.samples,
            runtime=runtime,
            limits=rows.limits,
            cache=cache_of(trained, config),
            pooled=False,
        )
        return found[LAST]

    return make


def finetune(experiment: "Experiment") -> None:
    """Runs all arms that are not finished, writes the summary and prints it."""
    from iwm_ray.finetuning import summary

    with RunDirectory(experiment.folder).lock():
        experiment.start()
        results = experiment.run(_Progress(experiment).say)
        found = summary.summarise(results, experiment.tasks)
        found |= {"status": "finished", "step": experiment.trained.step}
        write_json(experiment.folder / "summary.json", found)
        _draw(experiment, found)
        track(experiment.trained, experiment.folder, found["metrics"], ("summary.json", "efficiency.png"))
    print("\n".join(summary.lines(found)))
    print(f"summary      {experiment.folder / 'summary.json'}")
    print(f"picture      {experiment.folder / 'efficiency.png'}")
    for folder in sorted((experiment.folder / "adapters").glob("*/")):
        print(f"adapter      {folder}")


def _draw(experiment: "Experiment", found: dict[str, Any]) -> None:
    from iwm_ray.pictures.efficiency import accuracy_against_parameters

    title = f"Finetuning of {experiment.trained.config.recipe}, step {experiment.trained.step}"
    figure = accuracy_against_parameters(found["efficiency"], title)
    figure.savefig(experiment.folder / "efficiency.png")


def track(trained: "Trained", folder: Path, metrics: Mapping[str, float], files: Sequence[str]) -> None:
    """Adds the figures to the run's metrics and to its MLflow run, with files of the folder, unless that is elsewhere."""
    from iwm_ray import summary
    from iwm_ray.runtime.tracking import NullTracker, open_tracker
    from iwm_ray.training.metrics_log import MetricsLog

    run = RunDirectory(trained.run.path)
    if not folder.is_relative_to(run.path):
        return
    try:
        with run.lock():
            MetricsLog(run.metrics).correct(trained.step, metrics)
            summary.renew(run)
            has_mlflow = importlib.util.find_spec("mlflow") is not None
            with (
                open_tracker(run.path, trained.config, run.path.name)
                if has_mlflow
                else NullTracker() as tracker
            ):
                for name in files:
                    tracker.log_file(folder / name, f"finetune/{folder.name}")
                tracker.finish()
    except UsageError as error:  # the run is still training, and its directory is its own
        print(f"not tracked: {error}", file=sys.stderr)


def plan_lines(experiment: "Experiment") -> list[str]:
    """What `--dry-run` prints."""
    config, trained, arms = experiment.config, experiment.trained, experiment.planned()
    left = [arm for arm in arms if experiment.finished(arm) is None]
    lines = [
        f"plan of {experiment.folder}",
        f"  model      {trained.path}, {config.encoder} encoder",
        *(
            f"  data       {task.name}: {len(task.train):,} training and {len(task.test):,} test images, "
            f"{len(task.class_names)} classes; {experiment.num_steps((task.name,))[0]:,} steps"
            for task in experiment.tasks.values()
        ),
        f"  arms       {len(arms)}, {len(arms) - len(left)} of them finished: {len(experiment.families)} networks x "
        f"{len(config.seeds)} seeds"
        + (f" + {len(config.lr_grid)} rates to choose from" if config.lr_grid else ""),
        f"  images     {sum(experiment.num_images(arm) for arm in left):,} to train on",
        f"  device     {experiment.device}",
    ]
    return lines


class _Progress:
    """Shows which arm runs, how far it is, and how long the rest will take."""

    def __init__(self, experiment: "Experiment") -> None:
        self._experiment = experiment
        self._left = [arm for arm in experiment.planned() if experiment.finished(arm) is None]
        self._total, self._images = len(self._left), sum(experiment.num_images(arm) for arm in self._left)
        self._begin, self._shown_at, self._done = time.monotonic(), 0.0, 0
        self._arm: Arm | None = None
        self._number = 0

    def say(self, arm: "Arm", step: int, num_steps: int, images: int, loss: float) -> None:
        if arm != self._arm:
            self._done += self._experiment.num_images(self._arm) if self._arm else 0
            self._arm, self._number = arm, self._number + 1
        now = time.monotonic()
        if now - self._shown_at < _SECONDS_BETWEEN_LINES and step < num_steps:
            return
        self._shown_at = now
        rate = (self._done + images) / (now - self._begin)
        left = max(0, self._images - self._done - images) / rate
        print(
            f"{self._number}/{self._total} {arm.name} · step {step}/{num_steps} · loss {loss:.4f} · "
            f"{rate:,.0f} images/s · {duration(left)} left",
            flush=True,
        )


if __name__ == "__main__":
    main()
