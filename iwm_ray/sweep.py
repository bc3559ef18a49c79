"""The command behind the documents in sweeps/: plans a sweep, runs what is not done yet, and reports.

python sweeps/spectrum.py --size cifar10 --data.path train.parquet --data.test-path test.parquet
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from iwm_ray import cli
from iwm_ray.config import Config, TrackingConfig
from iwm_ray.driver import Stop, beside, refuse_workers
from iwm_ray.errors import RunError, UsageError
from iwm_ray.evaluation.settings import MeasureConfig
from iwm_ray.finetuning.settings import FinetuneConfig, FinetuneDataConfig
from iwm_ray.run_directory import RunDirectory
from iwm_ray.sweeping.job import Job
from iwm_ray.sweeping.record import SweepDirectory
from iwm_ray.sweeping.results import MRR, OUTCOMES, Result, compared
from iwm_ray.sweeping.space import SEED, Size, Sweep, Trial, choose, short_names
from iwm_ray.training.metrics_log import MetricsLog
from iwm_ray.wording import counted

if TYPE_CHECKING:
    from iwm_ray.runtime.tracking import NullTracker
    from iwm_ray.runtime.tune import Asha, Room
    from iwm_ray.sweeping.report import Report

Define = Callable[[Size], Sweep]
"""from the size that is wanted, the sweep"""

_TRACKING_SECONDS = 60.0
_PARENT_SECONDS = 20.0  # a store that is away: the children then stand alone
_JUDGED = {"monitor/loss": "min", "train/loss": "min"} | {
    f"monitor/{name}": "max" for name in ("knn_top1", "rankme", "lidar", "action_gap", "cosine", "target_std")
}
"""metric that a training writes on its way -> which end of it is good"""


def main(define: Define, arguments: Sequence[str] | None = None) -> None:
    """Runs a sweep document's command line and exits with its code."""
    given = sys.argv[1:] if arguments is None else arguments
    sys.exit(cli.run_command(lambda words: _main(define, words), given))


def _main(define: Define, arguments: Sequence[str]) -> None:
    options = _parser(sys.modules[define.__module__].__doc__ or "").parse(arguments)
    if options.want_mrr is not None and not 0 <= options.want_mrr <= 1:
        raise UsageError(f"--want-mrr {options.want_mrr:g}: needs a number from 0 to 1")
    if options.report is None:
        _refuse_dial(options)
    else:
        _write_report(_open_report(options), options)
        return
    sweep = read_sweep(define, options)
    directory = SweepDirectory((options.output or default_output(sweep, options)).absolute())
    plan = make_plan(sweep, directory, options)
    print("\n".join(plan_lines(plan)))
    if options.dry_run:
        return
    run(plan, options.debug)
    from iwm_ray.sweeping.report import Report

    report = Report.open(directory.path)
    _write_report(report, options)
    _track_report(plan, report)
    failed = list(directory.failures().values())
    if failed:
        names = "; ".join(f"{each['title']}: {each['reason']}" for each in failed)
        raise RunError(f"{counted(len(failed), 'trial')} failed, the same command tries again: {names}")


# ---- the command line ----


def _parser(document: str) -> cli.Parser:
    parser = cli.Parser(
        prog=f"python {Path(sys.argv[0]).name}",
        description=document,
        epilog="The same command continues an interrupted sweep: it runs no finished trial again.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=None,
    )
    parser.add_argument(
        "--size", choices=get_args(Size), default="laptop", help="how large; default laptop (photographs)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the sweep; default runs/sweeps/NAME-SIZE"
    )
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="seeds of every configuration")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print trials, work, hours and resources, also those that this machine lacks; start nothing",
    )
    parser.add_argument("--smoke", action="store_true", help="one tiny value of each axis")
    parser.add_argument("--no-finetune", action="store_true", help="leave out predictor finetuning")
    parser.add_argument(
        "--report",
        metavar="WHERE",
        help="only write the report: of a sweep's folder, of a folder of runs, or, from MLflow alone, of an experiment of "
        "--tracking.uri or of that store's URI (with --tracking.experiment) or of the id of a sweep's MLflow run",
    )
    parser.add_argument(
        "--want-mrr",
        type=float,
        metavar="X",
        help="of a report: name the known configuration nearest to this MRR",
    )
    parser.add_argument(
        "--want", choices=WANTED, help="of a report: name the known configuration that is best at this"
    )
    _add_search(parser.add_argument_group("search and resources"))
    cli.add_common_options(parser)
    cli.add_settings(parser, Config)
    measuring = parser.add_argument_group("measure", MeasureConfig.__doc__)
    for name, field in MeasureConfig.model_fields.items():
        cli.add_option(measuring, f"measure.{name}", field)
    tuning = parser.add_argument_group("finetune", FinetuneConfig.__doc__)
    for name in FINETUNED:
        cli.add_option(tuning, f"finetune.{name}", FinetuneConfig.model_fields[name])
    for name in FINETUNED_ON:
        cli.add_option(tuning, f"finetune.{name}", FinetuneDataConfig.model_fields[name])
    return parser


def _add_search(group: argparse._ArgumentGroup) -> None:
    """How points are chosen, and how many trials run at once."""
    group.add_argument(
        "--search", choices=("grid", "random", "optuna"), default="grid", help="how points are chosen"
    )
    group.add_argument("--trials", type=int, metavar="N", help="how many points random and optuna choose")
    group.add_argument(
        "--asha", metavar="METRIC", help="stop trials that fall behind in a monitor, such as monitor/knn_top1"
    )
    group.add_argument(
        "--max-failures", type=int, default=1, metavar="N", help="attempts after the first; default 1"
    )
    group.add_argument(
        "--at-once", type=int, default=0, metavar="N", help="most trials at once; default as many as fit"
    )
    group.add_argument(
        "--gpus-per-trial",
        type=float,
        metavar="X",
        help="1, 0.5, 0.25 ...: small trials (engine local) share a GPU; default 1",
    )


FINETUNED = ("tune", "seeds", "epochs", "steps", "batch_size", "lr", "pretrained_lr_factor")
FINETUNED_ON = ("num_train", "num_test", "max_bad_fraction")


WANTED = ("best-linear", "best-attentive", "best-finetuned", "invariant", "equivariant")


def read_sweep(define: Define, options: argparse.Namespace) -> Sweep:
    """The sweep of the command line.

    Raises:
        UsageError: a value is wrong.
    """
    sweep = define(options.size)
    _refuse_ignored(sweep, options)
    tree = {"measure": sweep.measure.model_dump()} | sweep.base.model_dump()
    cli.override(tree, options)
    measure = cli.validate_as(MeasureConfig, tree.pop("measure"), "measure")
    finetune = _read_finetune(sweep.finetune, tree.pop("finetune", {}))
    sweep = replace(sweep, base=cli.validate(tree), measure=measure, finetune=finetune)
    if options.seeds:
        sweep = sweep.with_seeds(options.seeds)
    if options.no_finetune:
        sweep = replace(sweep, finetune=None)
    return sweep.smoke() if options.smoke else sweep


def _read_finetune(usual: FinetuneConfig | None, given: dict[str, object]) -> FinetuneConfig | None:
    """The sweep's own finetuning, changed; a sweep without one gets what is asked for."""
    if not given:
        return usual
    tree = (usual or FinetuneConfig()).model_dump()
    data = tree["data"] | {name: given.pop(name) for name in FINETUNED_ON if name in given}
    tree["data"] = cli.validate_as(FinetuneDataConfig, data, "finetune")
    return cli.validate_as(FinetuneConfig, tree | given, "finetune")


def _refuse_dial(options: argparse.Namespace) -> None:
    """What is asked of a report must not start days of training."""
    for name in ("want_mrr", "want"):
        value = getattr(options, name)
        if value is not None:
            raise UsageError(f"--{name.replace('_', '-')} {value}: asks a report; give --report DIR")


def _refuse_ignored(sweep: Sweep, options: argparse.Namespace) -> None:
    """What is given on the command line but would have no effect."""
    for name, value in vars(options).items():
        section, dot, _ = name.partition(".")
        words = " ".join(map(str, value)) if isinstance(value, list) else value
        given = f"--{name.replace('_', '-')} {words}"
        for axis in sweep.axes:
            if dot and name in axis.settings:
                raise UsageError(
                    f"{given}: is set by the axis {axis.name} of this sweep ({', '.join(axis.values)}); drop it, or change "
                    "the axis in the sweep's document"
                )
        if dot and section == "finetune" and options.no_finetune:
            raise UsageError(f"{given}: --no-finetune leaves finetuning out; drop one of them")


def default_output(sweep: Sweep, options: argparse.Namespace) -> Path:
    """`runs/sweeps/spectrum-cifar10`"""
    return Path("runs/sweeps") / f"{sweep.name}-{options.size}{'-smoke' if options.smoke else ''}"


# ---- the plan ----


@dataclass(frozen=True)
class Plan:
    """A sweep, resolved: which trials there are, which are left, and what they run on."""

    sweep: Sweep
    directory: SweepDirectory
    trials: list[Trial]
    left: list[Trial]
    search: str
    num_samples: int
    """points that optuna chooses"""
    asha: "Asha | None"
    max_failures: int
    room: "Room"
    work: str
    """arithmetic of what is left, in words"""
    time: str
    """of what is left, in words"""


def make_plan(sweep: Sweep, directory: SweepDirectory, options: argparse.Namespace) -> Plan:
    """Checks all there is to check before anything starts; opens the data, whose index the trials then share. A dry run
    may lack resources: it plans what is to be run elsewhere.

    Raises:
        UsageError: an axis, a value, the data, the search or the resources.
    """
    from iwm_ray.runtime import tracking, tune
    from iwm_ray.sweep_cost import cost

    tracking.check_uri(sweep.base)
    _check_search(options)
    if options.search == "optuna":
        sweep = sweep.with_seeds([sweep.trials()[0].config.seed])  # a seed is nothing to search for
    trials = sweep.trials()
    if options.search == "random":
        trials = choose(trials, options.trials, sweep.base.seed)
    directory.refuse_other(sweep, trials)
    _check_resources(options, trials[0].config)
    _check_paths(sweep, trials[0].config)
    left = [
        trial
        for trial in trials
        if directory.status(sweep, trial, keep_stopped=bool(options.asha)) not in ("finished", "stopped")
    ]
    find_room = tune.look_for_room if options.dry_run else tune.make_room
    gpus = 1.0 if options.gpus_per_trial is None else options.gpus_per_trial
    room = find_room(trials[0].config, gpus, max(1, len(left)), options.at_once)
    done = [trial for trial in trials if trial not in left]
    work = cost(sweep, left or trials[:1], done, directory)
    # After the cost, which has opened the training images: what is missing now is finetuning's.
    _check_finetuning(sweep, trials[0].config)
    num_samples = 0
    if options.search == "optuna":
        num_samples = max(0, min(options.trials - (len(trials) - len(left)), len(left)))
        left = left if num_samples else []
    return Plan(
        sweep,
        directory,
        trials,
        left,
        options.search,
        num_samples,
        _asha(options.asha, trials[0].config, work.steps) if options.asha else None,
        options.max_failures,
        room,
        work.work,
        work.line(trials[0].config, room.at_once, elsewhere=bool(room.problem)),
    )


def _check_search(options: argparse.Namespace) -> None:
    for name, least in (("trials", 1), ("max_failures", 0), ("at_once", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} {value}: needs {least} or more")
    if options.search == "grid" and options.trials:
        raise UsageError(
            f"--trials {options.trials}: a grid runs every point; add --search random or optuna, or drop it"
        )
    if options.search != "grid" and not options.trials:
        raise UsageError(f"--search {options.search}: needs --trials N, how many of the points")
    if options.asha and options.asha not in _JUDGED:
        raise UsageError(
            f"--asha {options.asha}: no metric that a training writes on its way; give one of {', '.join(_JUDGED)}"
        )
    if options.search != "optuna":
        return
    if importlib.util.find_spec("optuna") is None:
        raise UsageError("--search optuna: optuna is not installed; pip install 'iwm_ray[sweep]'")
    if options.asha:
        raise UsageError("--search optuna has two goals, and --asha follows one metric; drop one of them")
    if len(options.seeds or ()) > 1:
        given = " ".join(map(str, options.seeds))
        raise UsageError(
            f"--seeds {given}: a seed is nothing to search for; give one with --search optuna, and more seeds of what it "
            "finds by a grid"
        )


def _check_resources(options: argparse.Namespace, config: Config) -> None:
    """What would be asked in vain."""
    if config.runtime.engine == "local":
        refuse_workers(config)
    if options.gpus_per_trial is None:
        return
    given = f"--gpus-per-trial {options.gpus_per_trial:g}"
    if not config.runtime.use_gpu:
        raise UsageError(f"{given}: these trials use no GPU; add --runtime.use-gpu true, or drop it")
    if config.runtime.engine == "ray" and options.gpus_per_trial < 1:
        raise UsageError(
            f"{given}: engine ray gives each worker a whole GPU; set --runtime.engine local, or drop it"
        )


def _check_paths(sweep: Sweep, config: Config) -> None:
    """All that is missing at once."""
    if config.data.path:
        return
    tuned = sweep.finetune is not None and not sweep.finetune.data.path and not config.data.test_path
    more = " and, for finetuning, --data.test-path (or --no-finetune)" if tuned else ""
    raise UsageError(
        f"recipe {config.recipe} needs --data.path{more}: a class-folder tree, Parquet file(s) or WebDataset shards"
    )


def _check_finetuning(sweep: Sweep, config: Config) -> None:
    """A trial must not train for hours before it is found that nothing can be tuned."""
    from iwm_ray.trial import check_finetuning

    if sweep.finetune is None:
        return
    try:
        check_finetuning(sweep.finetune, config)
    except UsageError as error:
        raise UsageError(f"{error}; or leave finetuning out by --no-finetune") from None


def _asha(metric: str, config: Config, steps: int) -> "Asha":
    """Trials are compared from the second reading of the monitors on."""
    from iwm_ray.runtime.tune import Asha

    every = config.monitor.every_steps or max(1, steps // 10)
    if 2 * every > steps:
        raise UsageError(
            f"--asha {metric}: compares from step {2 * every} on, the second reading of the monitors, and a training has "
            f"{steps} steps; set --monitor.every-steps to {max(1, steps // 10)}"
        )
    return Asha(metric, _JUDGED[metric], steps, 2 * every)


def plan_lines(plan: Plan) -> list[str]:
    """What is printed before anything starts."""
    sweep, tuned = plan.sweep, plan.sweep.finetune
    trained = sum(plan.directory.training(trial.hash) == "finished" for trial in plan.left)
    chosen = f"; {plan.search} chooses {plan.num_samples}" if plan.num_samples else ""
    if plan.search == "random":
        count, points = len(plan.trials), len(sweep.trials())
        chosen = f"; random chooses {'all' if count == points else f'{count} of'} {points} points"
    lines = [
        f"sweep {sweep.name}: {plan.directory.path}",
        f"  question   {sweep.question}",
        *(f"  axis       {axis.name}: {', '.join(axis.values)}" for axis in sweep.axes),
        f"  trials     {len(plan.trials)}, {len(plan.trials) - len(plan.left)} of them done"
        + (f", {trained} more trained" if trained else "")
        + chosen,
        f"  measured   {' '.join(sweep.measure.tasks)}"
        + (
            f"; finetuned: {' '.join(tuned.tune)}, with controls, {counted(len(tuned.seeds), 'seed')}"
            if tuned
            else ""
        ),
        f"  resources  {plan.room.line}",
        f"  work       {plan.work}",
        f"  time       {plan.time}",
    ]
    if plan.asha:
        lines.append(
            f"  scheduler  ASHA on {plan.asha.metric} ({plan.asha.mode}), from step {plan.asha.grace_steps}"
        )
    return lines


def _open_report(options: argparse.Namespace) -> "Report":
    """From a folder, or from MLflow where there are no trials in a folder of that name."""
    from iwm_ray.sweeping.report import Report

    place = Path(options.report)
    if SweepDirectory(place).holds_any():
        return Report.open(place)
    if place.is_file():
        raise UsageError(
            f"--report {options.report}: is a file; give a sweep's folder, or a store as sqlite:///{place.absolute()}"
        )
    if importlib.util.find_spec("mlflow") is None:
        raise UsageError(
            f"--report {options.report}: no trials there, and MLflow is not installed; give the folder of a sweep, or one "
            "of run directories"
        )
    from iwm_ray.runtime.tracked import read_report

    tree: dict[str, dict[str, object]] = {}
    cli.override(tree, options)
    usual = cli.validate_as(TrackingConfig, tree.get("tracking", {}), "tracking")
    try:
        return read_report(options.report, usual, options.output)
    except UsageError as error:
        if not place.is_dir():
            raise
        reason = str(error).removeprefix(f"--report {options.report}: ").removeprefix("no such folder; ")
        raise UsageError(
            f"--report {options.report}: no trials in that folder (a sweep's has them, or one of run directories); MLflow: "
            f"{reason}"
        ) from None


def _write_report(report: "Report", options: argparse.Namespace) -> None:
    """Writes and names the report; prints its sentences and what was asked of the dial."""
    page = report.write()
    print("\n".join(report.text))
    for want in (options.want_mrr, options.want):
        if want is not None:
            print("\n".join(report.wanted(want)))
    print(f"report       {page}", flush=True)


# ---- running ----


def run(plan: Plan, debug: bool = False) -> None:
    """Runs the trials that are left; fails only where nothing could be started at all.

    Raises:
        SystemExit: a signal stopped it, after saving (130 or 143).
    """
    from iwm_ray.runtime import tune
    from iwm_ray.trial import run_trial

    if not plan.left:
        return
    sweep, directory = plan.sweep, plan.directory
    run_directory = RunDirectory(directory.path)
    stop = Stop(run_directory)
    with run_directory.lock():
        run_directory.stop_request.unlink(missing_ok=True)
        directory.plan(sweep, plan.trials, plan.search)
        with _parent(plan) as tags:
            tune.connect(plan.left[0].config, plan.room, debug)
            jobs = [Job(sweep, trial, directory, tags) for trial in plan.left]
            searcher = None
            if plan.search == "optuna":
                from iwm_ray.runtime.optuna_search import TwoGoals

                searcher = TwoGoals(sweep, directory)
            run_trials = partial(
                tune.run_trials,
                jobs,
                run_trial,
                plan.room,
                max_failures=plan.max_failures,
                asha=plan.asha,
                searcher=searcher,
                num_samples=plan.num_samples,
                say=lambda line: print(line, flush=True),
                debug=debug,
            )
            with stop.listening():
                beside(lambda: None, run_trials)
            if stop.received:
                print("saved; the same command goes on from there", flush=True)
                sys.exit(stop.exit_code)


def _track_report(plan: Plan, report: "Report") -> None:
    """Adds the report, and the few figures that it comes to, to the sweep's MLflow run."""
    directory, run_directory = plan.directory, RunDirectory(plan.directory.path)
    with run_directory.lock():
        finished = sum(result.status == "finished" for result in report.results)
        MetricsLog(run_directory.metrics).correct(finished, report.figures())
        tracker = open_parent(directory, plan.sweep).start()
        _share_view(plan, tracker, report.results)
        tracker.log_tags({"mlflow.note.content": _note(plan.sweep, [*report.text, "", *report.markdown()])})
        for file in sorted(directory.report.iterdir()):
            tracker.log_file(file, "report")
        tracker.finish("FAILED" if directory.failures() else "FINISHED", _TRACKING_SECONDS)


_UNDER_WAY = "Under way; the report follows when the last trial has ended."


def _note(sweep: Sweep, findings: Sequence[str]) -> str:
    """The description of the sweep's MLflow run, Markdown."""
    figures = ", ".join(f"`{name}`" for name in (MRR, *(each.metric for each in OUTCOMES[:3])))
    return "\n".join(
        [
            f"**{sweep.question}**",
            "",
            *findings,
            "",
            f"One child is one trial, the params `axis.*` are what varies; compare {figures}. The report with its pictures "
            "and tables is among the artifacts: `report/report.html`.",
        ]
    )


@contextmanager
def _parent(plan: Plan) -> Iterator[dict[str, str]]:
    """The MLflow run of the sweep; gives the tags that make a trial's run its child."""
    tags = {"iwm.sweep": plan.sweep.name}
    with open_parent(plan.directory, plan.sweep) as tracker:
        tracker.log_file(plan.directory.definition, "")
        until = time.monotonic() + _PARENT_SECONDS
        while tracker.uri != "none" and not tracker.run_id and time.monotonic() < until:
            time.sleep(0.1)
        _share_view(plan, tracker, [])
        yield tags | ({"mlflow.parentRunId": tracker.run_id} if tracker.run_id else {})


def _share_view(plan: Plan, tracker: "NullTracker", results: Sequence[Result]) -> None:
    """Puts the sweep into the menu "Views" of MLflow's page."""
    from iwm_ray.runtime.sweep_view import view, view_tag

    if not tracker.run_id:
        return
    name, axes = plan.sweep.name, plan.sweep.axes
    short = short_names(axis.name for axis in axes)
    varied = [f"axis.{short[axis.name]}" for axis in axes if axis.name != SEED]
    shown = view(f"Sweep {name}", tracker.run_id, varied, compared(results), round(1000 * time.time()))
    tracker.log_experiment_tag(view_tag(name), shown)


def open_parent(directory: SweepDirectory, sweep: Sweep) -> "NullTracker":
    """The tracker of the whole sweep."""
    from iwm_ray.runtime import tracking

    if importlib.util.find_spec("mlflow") is None:
        return tracking.NullTracker()
    short = short_names(axis.name for axis in sweep.axes)
    tags = {"iwm.sweep": sweep.name, "mlflow.note.content": _note(sweep, [_UNDER_WAY])}
    tags |= {f"iwm.axis.{short[axis.name]}": ", ".join(axis.values) for axis in sweep.axes}
    return tracking.open_tracker(directory.path, sweep.base, f"sweep {sweep.name}", tags)
