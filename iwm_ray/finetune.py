"""`python -m iwm_ray.finetune RUN --data.path TRAIN --data.test-path TEST`: tunes a trained model for tasks.

Predictor finetuning with its control, encoder finetuning, end-to-end; several data sets make it multi-task. The same
command again runs what is not finished, from the step that was saved last.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from iwm_ray import cli
from iwm_ray.finetuning.settings import FinetuneConfig
from iwm_ray.run_directory import RunDirectory, write_json
from iwm_ray.wording import counted

if TYPE_CHECKING:
    from iwm_ray.driver import Stop
    from iwm_ray.finetuning.experiment import Experiment


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits with its code."""
    sys.exit(cli.run_command(_main, sys.argv[1:] if arguments is None else arguments))


def _main(arguments: Sequence[str]) -> None:
    options = _parser().parse(arguments)
    config = cli.tuning_config(options, FinetuneConfig)
    from iwm_ray.driver import Stop
    from iwm_ray.finetuning.experiment import Experiment
    from iwm_ray.trained import Trained
    from iwm_ray.tuning_driver import CachedTokens, preflight

    trained = Trained.open(options.run, options.checkpoint)
    experiment = Experiment.open(trained, config, options.output, CachedTokens(trained, config))
    experiment.refuse_unused()
    resources = preflight(experiment)
    if options.dry_run:
        print("\n".join([*plan_lines(experiment), f"  resources  {resources}"]))
        return
    finetune(experiment, Stop(RunDirectory(experiment.folder)), options.debug)


def _parser() -> cli.Parser:
    description = (
        "Tune a trained world model for one or several labelled data sets. Several data sets are given as NAME=PATH words "
        "behind --data.path and, in the same order, behind --data.test-path."
    )
    return cli.tuning_parser("finetune", description, FinetuneConfig, "<tasks>-<hash>")


def finetune(experiment: "Experiment", stop: "Stop | None" = None, debug: bool = False) -> None:
    """Runs all arms that are not finished, writes the summary and prints it; see `tuning_driver.run`."""
    from iwm_ray import tuning_driver
    from iwm_ray.finetuning import summary

    with RunDirectory(experiment.folder).lock():
        experiment.start()
        tuning_driver.run(experiment, stop, debug)
        found = summary.summarise(experiment.results(), experiment.tasks, experiment.config.ways)
        found |= {"status": "finished", "step": experiment.trained.step}
        found["undecodable"] = experiment.num_undecodable()
        write_json(experiment.folder / "summary.json", found)
        _draw(experiment, found)
        files = ("config.json", "summary.json", "efficiency.png")
        tuning_driver.track(experiment, found["metrics"], files)
    print("\n".join([*summary.lines(found), *experiment.undecodable_lines()]))
    print(f"summary      {experiment.folder / 'summary.json'}")
    print(f"picture      {experiment.folder / 'efficiency.png'}")
    for folder in sorted((experiment.folder / "adapters").glob("*/")):
        print(f"adapter      {folder}")


def _draw(experiment: "Experiment", found: dict[str, Any]) -> None:
    from iwm_ray.pictures.efficiency import accuracy_against_cost

    title = f"Finetuning of {experiment.trained.config.recipe}, step {experiment.trained.step}"
    figure = accuracy_against_cost(found["efficiency"], title)
    figure.savefig(experiment.folder / "efficiency.png")


def plan_lines(experiment: "Experiment") -> list[str]:
    """What `--dry-run` prints."""
    config, trained, arms = experiment.config, experiment.trained, experiment.planned()
    left = [arm for arm in arms if not experiment.is_finished(arm)]
    return [
        f"plan of {experiment.folder}",
        f"  model      {trained.path}, {config.encoder} encoder",
        *(
            f"  data       {task.name}: {len(task.train):,} training and {len(task.test):,} test images, "
            f"{len(task.class_names)} classes; {_steps(experiment, task.name)}"
            for task in experiment.tasks.values()
        ),
        f"  arms       {len(arms)}, {len(arms) - len(left)} of them finished: {len(experiment.families)} networks x "
        f"{counted(len(config.seeds), 'seed')}"
        + (f" + {len(config.lr_grid)} rates to choose from" if config.lr_grid else ""),
        f"  images     {sum(experiment.num_images(arm) for arm in left):,} to train on",
    ]


def _steps(experiment: "Experiment", task: str) -> str:
    """How long is trained for a task, and where shares decide that, of how many steps."""
    own, everything = experiment.num_steps((task,))[0], sum(experiment.num_steps(tuple(experiment.tasks)))
    return f"{own:,} steps" + f" of {everything:,} by data.weights" * bool(experiment.config.data.weights)


if __name__ == "__main__":
    main()
