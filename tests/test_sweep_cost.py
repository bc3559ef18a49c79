"""What a sweep costs: against counts worked out by hand, and against the times of trials that are done."""

from dataclasses import replace

import pytest

from iwm_ray.build import build
from iwm_ray.config import Config
from iwm_ray.evaluation import probes
from iwm_ray.finetuning.settings import FinetuneConfig
from iwm_ray.model.heads import AttentiveHead
from iwm_ray.run_directory import RunDirectory, write_json
from iwm_ray.sweep_cost import Cost, cost, trial_work
from iwm_ray.sweeping.record import DONE, SweepDirectory
from iwm_ray.sweeping.space import Axis, Sweep, base


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Sweep:
    config = base("laptop")
    runtime = config.runtime.model_copy(update={"cache": str(tmp_path_factory.mktemp("cache"))})
    tuned = FinetuneConfig.model_validate(
        {"steps": 10, "batch_size": 16, "seeds": (0,), "data": {"num_train": 100}}
    )
    return Sweep(
        "test",
        "?",
        config.model_copy(update={"runtime": runtime}),
        (Axis.of("seed", 0, 1, 2),),
        finetune=tuned,
    )


@pytest.fixture(scope="module")
def work(sweep, tmp_path_factory):
    """`work(measure=..., finetune=..., steps=...)`: of one trial, with these changes."""
    run = RunDirectory(tmp_path_factory.mktemp("run"))

    def of(measure=None, finetune=None, steps=0):
        config = sweep.base
        if steps:
            config = config.model_copy(
                update={"schedule": config.schedule.model_copy(update={"steps": steps})}
            )
        changed = replace(
            sweep,
            measure=sweep.measure.model_copy(update=measure or {}),
            finetune=sweep.finetune.model_copy(update=finetune or {}),
        )
        return trial_work(build(config, run), changed)

    return of


def test_each_part_grows_with_what_it_is_made_of(work):
    one = work(steps=10)
    longer = work(steps=30)
    assert longer["train"] == pytest.approx(3 * one["train"])
    assert (longer["evaluate"], longer["finetune"]) == (one["evaluate"], one["finetune"])
    assert work(measure={"untrained": True}, steps=10)["evaluate"] == pytest.approx(2 * one["evaluate"])
    assert work(finetune={"seeds": (0, 1)}, steps=10)["finetune"] > 1.5 * one["finetune"]
    assert work(finetune={"tune": ("predictor", "both")}, steps=10)["finetune"] > 2 * one["finetune"]


def test_the_bank_is_counted_by_hand(work, sweep):
    """A linear layer of a to b costs 2 a b a token; attention over n tokens 4 n^2 d."""
    config = sweep.base
    tokens, width, depth = config.grid[0] * config.grid[1], config.encoder.width, config.encoder.depth
    patches = 2 * tokens * 3 * config.encoder.patch_size**2 * width
    encoder = patches + depth * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)
    few = work(measure={"tasks": ("mrr",), "images": 10, "views": 100, "targets": 2})["evaluate"]
    more = work(measure={"tasks": ("mrr",), "images": 10, "views": 200, "targets": 2})["evaluate"]
    assert more - few == pytest.approx(10 * 100 * encoder, rel=0.01)


def test_the_attentive_grid_is_in_it(work, sweep):
    """Its least number of steps makes it dear for a small training."""
    plain = {"tasks": ("linear",), "train_images": 200, "test_images": 100}
    both = plain | {"tasks": ("linear", "attentive")}
    grid = probes.ATTENTIVE
    head_parameters = sum(p.numel() for p in AttentiveHead(sweep.base.encoder.width, 10, 1).parameters())
    least = 3 * 500 * grid.batch_size * 7 * 2 * head_parameters  # more: keys and values are of every token
    assert work(measure=both)["evaluate"] - work(measure=plain)["evaluate"] > least


def test_the_pace_of_finished_trials_is_taken(sweep, tmp_path):
    """Of those that were done in one attempt: of others nobody knows how long they took."""
    directory = SweepDirectory(tmp_path)
    first, second, third = sweep.trials()
    for trial, seconds in ((first, {"train": 100.0, "evaluate": 20.0, "finetune": 30.0}), (second, {})):
        run = directory.run(trial.hash)
        run.path.mkdir(parents=True)
        write_json(run.path / DONE, {"seconds": seconds})
    found = cost(sweep, [third], [first, second], directory)
    assert found.done == 1
    parts = "1 min 40 s training, 20 s measuring, 30 s finetuning"
    assert found.line(sweep.base, 1) == f"2 min 30 s ({parts}) at the pace of 1 finished trial"
    assert found.line(sweep.base, 2).startswith("1 min 15 s")
    assert "GPU-hours" in found.line(sweep.base, 2, elsewhere=True)


def test_what_is_trained_is_not_trained_again(sweep, tmp_path):
    """A trial of which more is asked now than it was: only that is left."""
    directory, trials = SweepDirectory(tmp_path), sweep.trials()
    both = cost(sweep, trials[:2], [], directory).left
    directory.run(trials[0].hash).path.mkdir(parents=True)
    write_json(directory.run(trials[0].hash).summary, {"status": "finished"})
    left = cost(sweep, trials[:2], [], directory).left
    assert left == {**both, "train": both["train"] / 2}


def test_a_gpu_is_counted_in_hours():
    config = Config.model_validate({"recipe": "x", "runtime": {"use_gpu": True}})
    left = {"train": 3600e15, "evaluate": 1800e15, "finetune": 0.0}
    words = Cost(left, 10, 0, {}).line(config, 4)
    assert Cost(left, 10, 0, {}).work.startswith("5.4 EFLOP (3.6 training, 1.8 measuring)")
    assert Cost({"train": 2e12}, 10, 0, {}).work.startswith("2.0 TFLOP (2.0 training)")
    assert words.startswith("1.5 GPU-hours at 1000 TFLOP/s (1.0 training, 0.5 measuring); expect")
