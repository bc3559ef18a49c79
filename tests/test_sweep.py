"""The command line of a sweep document; that sweeps really run is in runtime/test_tune.py."""

import pytest

from iwm_ray.errors import UsageError
from iwm_ray.finetuning.settings import FinetuneConfig
from iwm_ray.sweep import _parser, read_sweep
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
