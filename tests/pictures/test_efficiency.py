import pytest

from iwm_ray.pictures.efficiency import accuracy_against_parameters


def row(
    task="cifar10", tune="predictor", predictor="pretrained", multitask=False, top1=0.4, parameters=1_100_000
):
    return {
        "task": task,
        "tune": tune,
        "predictor": predictor,
        "multitask": multitask,
        "trained_parameters": parameters,
        "top1": top1,
        "low": top1 - 0.02,
        "high": top1 + 0.03,
    }


@pytest.mark.parametrize("tasks", [["cifar10"], ["cifar10", "fashion", "signs", "birds"]])
def test_each_task_has_a_panel_that_can_be_read(tasks, legible):
    rows = [row(task, predictor=start) for task in tasks for start in ("pretrained", "random")]
    rows += [row(task, tune="encoder", predictor="none", parameters=900_000, top1=0.45) for task in tasks]
    figure = accuracy_against_parameters(rows, "Finetuning of cifar10_small")
    assert [axes.get_title(loc="left") for axes in figure.axes] == tasks
    texts = legible(figure)
    assert "Finetuning of cifar10_small" in texts


def test_points_stand_where_the_numbers_are():
    figure = accuracy_against_parameters([row(), row(predictor="random", top1=0.25)], "x")
    (axes,) = figure.axes
    points = [tuple(container[0].get_xydata()[0]) for container in axes.containers]
    assert points == [pytest.approx((1.1, 40)), pytest.approx((1.1, 25))]


def test_a_single_task_and_several_at_once_are_told_apart():
    figure = accuracy_against_parameters([row(), row(multitask=True)], "x")
    assert [container[0].get_marker() for container in figure.axes[0].containers] == ["o", "s"]
    assert len(figure.legends[0].get_texts()) == 2
