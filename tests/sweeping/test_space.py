"""A sweep as a value: its trials, their names, and what is refused before anything starts."""

import importlib.util
from pathlib import Path

import pytest

from iwm_ray.cli import parse_pretrain
from iwm_ray.errors import UsageError
from iwm_ray.sweeping.results import pretrain_command
from iwm_ray.sweeping.space import SIZES, Axis, Sweep, base, choose, finetuning, short_names

DOCUMENTS = sorted((Path(__file__).parents[2] / "sweeps").glob("*.py"))


def sweep(*axes: Axis) -> Sweep:
    return Sweep("test", "Does it work?", base("laptop"), axes)


def test_a_grid_has_every_point_once_seed_by_seed():
    trials = sweep(Axis.of("predictor.depth", 2, 4), Axis.of("seed", 0, 1, 2)).trials()
    assert [(trial.config.predictor.depth, trial.config.seed) for trial in trials] == [
        (depth, seed) for seed in (0, 1, 2) for depth in (2, 4)
    ]
    assert len({trial.hash for trial in trials}) == 6
    assert all(trial.hash == trial.config.hash() for trial in trials)
    assert trials[2].title == "predictor.depth=2 seed=1"
    assert trials[2].group == {"predictor.depth": "2"}


def test_small_sweeps_are_finetuned_end_to_end_too():
    assert [finetuning(size).tune for size in ("laptop", "cifar10")] == [("predictor", "both")] * 2
    assert finetuning("imagenet") is None


def test_short_names_stay_apart():
    axes = ["predictor.depth", "encoder.depth", "predictor.conditioning", "strength"]
    assert short_names(axes) == {
        "predictor.depth": "predictor.depth",
        "encoder.depth": "encoder.depth",
        "predictor.conditioning": "conditioning",
        "strength": "strength",
    }
    trial = sweep(Axis.of("predictor.conditioning", "none"), Axis.of("predictor.depth", 4)).trials()[0]
    assert trial.short_title == "none, depth 4"


def test_a_grown_grid_keeps_its_trials():
    small = sweep(Axis.of("predictor.depth", 2, 4), Axis.of("seed", 0))
    large = sweep(Axis.of("predictor.depth", 2, 4, 8), Axis.of("seed", 0, 1))
    assert {trial.hash for trial in small.trials()} < {trial.hash for trial in large.trials()}
    chosen = choose(large.trials(), 3, seed=1)
    assert choose(large.trials(), 5, seed=1)[:3] == chosen
    assert choose(large.trials(), 3, seed=2) != chosen


def test_an_axis_may_change_several_settings():
    axis = Axis(
        "strength", {"weak": {"views.hue": 0.01, "views.contrast": 0.1}, "strong": {"views.hue": 0.3}}
    )
    weak, strong = sweep(axis).trials()
    assert (weak.config.views.hue, weak.config.views.contrast) == (0.01, 0.1)
    assert (strong.config.views.hue, strong.config.views.contrast) == (0.3, base("laptop").views.contrast)
    assert weak.point == {"strength": "weak"}


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ([Axis.of("predictor.dept", 2)], "unknown setting 'predictor.dept'; did you mean 'predictor.depth'?"),
        ([Axis.of("predictor.depth", 2, -1)], "trial predictor.depth=-1: predictor.depth -1"),
        ([Axis.of("predictor.depth", 2), Axis.of("predictor.depth", 4)], "predictor.depth is given twice"),
        ([Axis.of("predictor.depth")], "predictor.depth: no values"),
        ([Axis.of("runtime.num_workers", 1, 2)], "runtime.num_workers cannot change results"),
        ([Axis("a", {"x": {"seed": 1}, "y": {"seed": 1}})], "a=y and a=x are the same configuration"),
        ([Axis.of("encoder.patch_size", 7)], "trial encoder.patch_size=7"),
    ],
)
def test_errors_are_one_line_before_anything_starts(axes, said):
    with pytest.raises(UsageError) as error:
        sweep(*axes).trials()
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("size", SIZES)
def test_every_document_defines_a_sweep_of_every_size(document, size):
    spec = importlib.util.spec_from_file_location(document.stem, document)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    defined = module.define(size)
    assert len(defined.trials()) >= 12
    assert "What would count as an answer" in module.__doc__
    smoke = defined.smoke().trials()
    assert len(smoke) == 1
    assert smoke[0].config.schedule.steps == 12
    command = pretrain_command(defined.trials()[-1].config).split()
    assert command[:3] == ["python", "-m", "iwm_ray.pretrain"]
    assert parse_pretrain(command[3:])[0].config.hash() == defined.trials()[-1].hash
