import math

import pytest
from matplotlib.figure import Figure

from iwm_ray.pictures.curves import PANELS, training_curves


def _rows(num_steps: int) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for step in range(10, num_steps + 1, 10):
        rows.append(
            {
                "step": step,
                "time": float(step),
                "train/loss": math.exp(-step / 300),
                "train/lr": 1e-3 * step / num_steps,
                "train/momentum": 0.996 + 0.004 * step / num_steps,
                "train/weight_decay": 0.04,
                "train/grad_norm": 0.3 + 0.1 * math.sin(step),
                "train/samples_per_second": 120_000.0 + step,
                "train/data_wait_fraction": 0.0,
            }
        )
        if step % 50 == 0:
            monitors = ("loss", "rankme", "target_std", "cosine", "action_gap", "knn_top1", "knn_chance")
            rows.append({"step": step} | {f"monitor/{name}": step / num_steps for name in monitors})
    return rows


@pytest.mark.parametrize("num_steps", [50, 600, 300_000])
def test_every_quantity_has_a_panel_that_can_be_read(num_steps: int, legible) -> None:
    rows = _rows(min(num_steps, 600))
    for row in rows:
        row["step"] *= num_steps / min(num_steps, 600)
    figure = training_curves(rows, "Training curves of photos_tiny")
    assert isinstance(figure, Figure)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [panel.title for panel in PANELS]
    texts = legible(figure)
    assert "Training curves of photos_tiny" in texts
    assert "best constant answer" in texts


def test_only_what_was_measured_is_drawn() -> None:
    figure = training_curves([{"step": 1, "train/loss": 0.5, "unknown/metric": 3.0}])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Training loss"]


def test_values_that_are_not_finite_are_left_out_and_counted(legible) -> None:
    losses = [1.0, math.nan, None, 0.5]  # metrics.jsonl writes NaN as null
    rows = [{"step": step, "train/loss": loss} for step, loss in enumerate(losses)]
    figure = training_curves(rows)
    assert figure.axes[0].get_title(loc="left") == "Training loss  (2 not finite)"
    assert list(figure.axes[0].lines[0].get_xdata()) == [0, 3]
    legible(figure)


def test_rows_may_come_in_any_order() -> None:
    rows = [{"step": step, "train/loss": float(step)} for step in (30, 10, 20)]
    assert list(training_curves(rows).axes[0].lines[0].get_ydata()) == [10, 20, 30]


@pytest.mark.parametrize("rows", [[], [{"step": 3, "mrr/mrr": 0.5}]])
def test_a_run_without_metrics_says_so(rows: list, legible) -> None:
    assert "no metrics yet" in legible(training_curves(rows))
