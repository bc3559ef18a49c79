from itertools import pairwise

import pytest

from iwm_ray.pictures.efficiency import accuracy_against_cost


def row(
    task="cifar10", tune="predictor", predictor="pretrained", multitask=False, top1=0.4, parameters=1_100_000
):
    return {
        "task": task,
        "tune": tune,
        "predictor": predictor,
        "multitask": multitask,
        "trained_parameters": parameters,
        "peak_memory": 63 * 2**20,
        "images_per_second": 2100.0,
        "inputs": "tokens" if tune == "predictor" else "images",
        "top1": top1,
        "low": top1 - 0.02,
        "high": top1 + 0.03,
    }


@pytest.mark.parametrize("tasks", [["cifar10"], ["cifar10", "fashion", "signs", "birds"]])
def test_each_task_has_a_line_that_can_be_read(tasks, legible):
    rows = [row(task, predictor=start) for task in tasks for start in ("pretrained", "random")]
    rows += [row(task, tune="encoder", predictor="none", parameters=900_000, top1=0.45) for task in tasks]
    figure = accuracy_against_cost(rows, "Finetuning of cifar10_small")
    assert [axes.get_title(loc="left") for axes in figure.axes[::3]] == tasks
    texts = legible(figure)
    assert {"Finetuning of cifar10_small", "trained parameters, millions", "memory to train, MiB"} <= set(
        texts
    )
    assert any(text.startswith("images/s") and "cached tokens" in text for text in texts)


def test_points_stand_where_the_numbers_are():
    figure = accuracy_against_cost([row(), row(predictor="random", top1=0.25)], "x")
    for axes, cost in zip(figure.axes, (1.1, 63, 2100), strict=True):
        points = [tuple(container[0].get_xydata()[0]) for container in axes.containers]
        assert points == [pytest.approx((cost, 40)), pytest.approx((cost, 25))]
        assert axes.get_xlim()[0] <= 0 and axes.get_xlim()[1] > cost
        low, high = axes.get_ylim()
        assert low < 23 and high > 43


def test_equal_points_do_not_hide_each_other_nor_leave_the_frame():
    rows = [
        row(predictor=start, multitask=multitask)
        for start in ("pretrained", "random")
        for multitask in (False, True)
    ]
    figure = accuracy_against_cost(rows, "x")
    figure.canvas.draw()
    for axes in figure.axes:
        lines = [container[0] for container in axes.containers]
        places = sorted(line.get_transform().transform(line.get_xydata()[0])[0] for line in lines)
        marker = 6 / 72 * figure.dpi
        assert all(right - left > marker for left, right in pairwise(places))
        frame = axes.get_window_extent()
        assert frame.x0 < places[0] - marker and places[-1] + marker < frame.x1


def test_a_single_task_and_several_at_once_are_told_apart():
    figure = accuracy_against_cost([row(), row(multitask=True)], "x")
    assert [container[0].get_marker() for container in figure.axes[0].containers] == ["o", "s"]
    assert len(figure.legends[0].get_texts()) == 2
