"""The command line of a sweep document; that sweeps really run is in runtime/test_tune.py."""

import pytest

from iwm_ray.errors import UsageError
from iwm_ray.finetuning.settings import FinetuneConfig
from iwm_ray.sweep import Plan, _parser, make_plan, read_sweep
from iwm_ray.sweeping.record import SweepDirectory
from iwm_ray.sweeping.space import Axis, Sweep, base


def define(size):
    tuned = (
        FinetuneConfig.model_validate({"epochs": 20, "data": {"num_train": 2000}})
        if size == "cifar10"
        else None
    )
    return Sweep("test", "?", base(size), (Axis.of("predictor.depth", 1, 4),), finetune=tuned)


def read(*words) -> Sweep:
    return read_sweep(define, _parser("?").parse(list(words)))


def test_what_is_asked_of_trials_is_set_by_options():
    sweep = read(
        "--size",
        "cifar10",
        "--measure.images",
        "99",
        "--finetune.seeds",
        "3",
        "4",
        "--finetune.num-test",
        "50",
    )
    assert sweep.measure.images == 99
    assert sweep.finetune.seeds == (3, 4)
    assert (sweep.finetune.epochs, sweep.finetune.data.num_train, sweep.finetune.data.num_test) == (
        20,
        2000,
        50,
    )
    assert read("--size", "cifar10").finetune == define("cifar10").finetune
    assert read("--size", "cifar10", "--no-finetune").finetune is None


def test_a_sweep_without_finetuning_gets_what_is_asked_for():
    assert read().finetune is None
    assert read("--finetune.tune", "predictor", "both").finetune.tune == ("predictor", "both")


def test_wrong_values_are_named():
    with pytest.raises(UsageError, match="epochs '-1'"):
        read("--finetune.epochs", "-1")
    with pytest.raises(UsageError, match="seeds 1 1"):
        read("--finetune.seeds", "1", "1")


@pytest.fixture
def plan(tmp_path, photo_cache):
    """`plan(*words)`: what the dry run of a sweep of photographs checks."""

    def made(*words: str) -> Plan:
        options = _parser("?").parse(["--runtime.cache", str(photo_cache), "--tracking.uri", "none", *words])
        return make_plan(read_sweep(define, options), SweepDirectory(tmp_path), options)

    return made


def test_a_finetuning_without_its_data_is_refused_before_anything_is_trained(plan):
    tuned = ("--finetune.tune", "predictor")
    assert len(plan(*tuned).left) == 2
    with pytest.raises(
        UsageError, match=r"data.test_path: empty.* give --data.test-path; or .* --no-finetune"
    ):
        plan(*tuned, "--data.test-path", "")
    with pytest.raises(UsageError, match="holds the training images"):
        plan(*tuned, "--data.test-path", "photos_tiny")
    assert len(plan("--data.test-path", "").left) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trials", "1"], "--trials 1: a grid runs every point; add --search random"),
        (["--search", "random"], "--search random: needs --trials N"),
        (["--search", "random", "--trials", "0"], "--trials 0: needs 1 or more"),
        (["--search", "random", "--trials", "-2"], "--trials -2: needs 1 or more"),
        (["--max-failures", "-1"], "--max-failures -1: needs 0 or more"),
        (["--at-once", "-1"], "--at-once -1: needs 0 or more"),
        (["--search", "optuna", "--trials", "1", "--seeds", "0", "1"], "--seeds 0 1: a seed is nothing to search for"),
        (["--asha", "mrr/mrr"], "--asha mrr/mrr: no metric that a training writes .* monitor/knn_top1"),
        (["--asha", "monitor/rankme", "--smoke"], "from step 200 on.* has 12 steps; set --monitor.every-steps to 1"),
        (["--asha", "monitor/rankme", "--monitor.every-steps", "251"], "from step 502 on.* has 500 steps"),
    ],
)  # fmt: skip
def test_a_search_that_cannot_run_is_refused_in_one_line(plan, words, said):
    with pytest.raises(UsageError, match=said) as error:
        plan(*words)
    assert "\n" not in str(error.value)


def test_asha_compares_from_the_second_reading_on(plan):
    asha = plan("--asha", "monitor/loss").asha
    assert (asha.mode, asha.grace_steps, asha.total_steps) == ("min", 200, 500)
    asha.scheduler()


def test_the_folder_of_other_settings_is_refused(plan, tmp_path):
    found = plan("--schedule.steps", "100")
    SweepDirectory(tmp_path).plan(found.sweep, found.trials)
    with pytest.raises(UsageError, match="its trials have schedule.steps 100, these 500"):
        plan()
