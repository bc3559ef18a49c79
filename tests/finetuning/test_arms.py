from dataclasses import replace

import pytest

from iwm_ray.errors import RunError
from iwm_ray.finetuning.arms import (
    Arm,
    ArmResult,
    families,
    figure_name,
    read_figures,
    read_result,
    read_results,
    write_result,
)
from iwm_ray.finetuning.settings import FinetuneConfig

RESULT = ArmResult({"a": "0110"}, 3, 24, 0.5, 100, 12.0, 1 << 20, "tokens", "x", "y")


def names(config, tasks):
    return [(family.tune, family.start, "+".join(family.tasks)) for family in families(config, tasks)]


def test_a_predictor_never_comes_without_its_control():
    config = FinetuneConfig(tune=("predictor", "encoder", "both"))
    assert names(config, ("a",)) == [
        ("predictor", "pretrained", "a"),
        ("predictor", "random", "a"),
        ("encoder", "none", "a"),
        ("both", "pretrained", "a"),
        ("both", "random", "a"),
    ]


def test_several_tasks_are_tuned_together_and_alone():
    config = FinetuneConfig(tune=("encoder",))
    assert [tasks for _, _, tasks in names(config, ("a", "b"))] == ["a+b", "a", "b"]
    together = config.model_copy(update={"single_tasks": False})
    assert [tasks for _, _, tasks in names(together, ("a", "b"))] == ["a+b"]


def test_results_survive(tmp_path):
    arm = Arm("predictor", "random", ("a",), 0, 1e-3)
    assert read_result(tmp_path, arm) is None
    write_result(tmp_path, arm, RESULT, {"lr": 1e-3}, {"finetune/a/top1_random_predictor": 0.5})
    write_result(tmp_path, replace(arm, is_choice=True), RESULT, {}, {})
    assert read_result(tmp_path, arm) == RESULT
    assert read_results(tmp_path) == {arm: RESULT}
    assert read_figures(tmp_path / f"{arm.name}.json") == {"finetune/a/top1_random_predictor": 0.5}
    assert RESULT.rights("a").tolist() == [0, 1, 1, 0]


def test_a_damaged_result_is_named(tmp_path):
    arm = Arm("predictor", "random", ("a",), 0, 1e-3)
    (tmp_path / f"{arm.name}.json").write_text("{")
    with pytest.raises(RunError, match="remove it, and the arm is run again"):
        read_result(tmp_path, arm)


@pytest.mark.parametrize(
    ("arm", "ways", "name"),
    [
        (Arm("predictor", "pretrained", ("a",), 0, 1.0), (), "finetune/a/top1"),
        (Arm("predictor", "random", ("a",), 0, 1.0), (), "finetune/a/top1_random_predictor"),
        (Arm("both", "pretrained", ("a", "b"), 0, 1.0), (), "finetune/a/multitask/both/top1"),
        (Arm("encoder", "none", ("a",), 0, 1.0), ("linear_head",), "finetune/a/encoder/linear_head/top1"),
        (Arm("both", "pretrained", ("a",), 0, 1.0), ("random_action",), "finetune/a/both/random_action/top1"),
        (Arm("encoder", "none", ("a",), 0, 1.0), ("random_action", "targets0.5"), "finetune/a/encoder/top1"),
    ],
)
def test_figures_have_names_that_say_what_was_done(arm, ways, name):
    assert figure_name(arm.family, "a", "top1", ways) == name
