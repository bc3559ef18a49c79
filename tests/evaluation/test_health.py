import math

import pytest

from iwm_ray.evaluation.health import judge

START = {
    "step": 0,
    "monitor/loss": 1.0,
    "monitor/rankme": 16.5,
    "monitor/target_std": 0.37,
    "monitor/action_gap": 0.003,
    "monitor/knn_top1": 0.25,
    "monitor/knn_chance": 0.1,
}
END = START | {
    "step": 600,
    "monitor/loss": 0.2,
    "monitor/rankme": 54.2,
    "monitor/target_std": 0.314,
    "monitor/action_gap": 0.12,
    "monitor/knn_top1": 0.61,
}
STEP = {"step": 600, "train/loss": 0.21, "train/skipped_steps": 0.0}


def _judge(conditioning: str = "feature", **changes: float) -> tuple[str, str]:
    end = END | {f"monitor/{name}": value for name, value in changes.items()}
    health = judge([START, STEP, end], conditioning, 192)
    assert health.line.startswith(f"{health.status}: ")
    assert "\n" not in health.line
    return health.status, health.line


def test_a_healthy_run_tells_its_last_readings() -> None:
    assert _judge() == ("ok", "ok: RankMe 54.2 of 192, std 0.31, action gap +0.120, kNN 0.61 (chance 0.10)")


def test_without_conditioning_no_gap_is_expected() -> None:
    status, line = _judge("none", action_gap=0.0)
    assert status == "ok"
    assert "invariant by construction" in line


def test_without_any_action_none_is_spoken_of() -> None:
    """A masked autoencoder: no gap is measured, and nothing is claimed to be invariant."""
    rows = [{k: v for k, v in row.items() if "gap" not in k} for row in (START, STEP, END)]
    assert judge(rows, "none", 192).line == "ok: RankMe 54.2 of 192, std 0.31, kNN 0.61 (chance 0.10)"


def test_without_labels_the_knn_is_left_out() -> None:
    unlabelled = [{k: v for k, v in row.items() if "knn" not in k} for row in (START, STEP, END)]
    assert judge(unlabelled, "feature", 192).line == "ok: RankMe 54.2 of 192, std 0.31, action gap +0.120"


@pytest.mark.parametrize(
    "changes", [{"rankme": 1.3, "target_std": 0.004}, {"rankme": 1.3}, {"target_std": 0.004}]
)
def test_constant_features_are_a_collapse(changes: dict[str, float]) -> None:
    status, line = _judge(**changes)
    assert status == "collapsed"
    assert "features are nearly constant" in line
    assert "schedule.momentum_start" in line
    assert "optimizer.lr" in line


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["loss", "rankme", "target_std"])
def test_what_is_not_finite_is_never_well(name: str, value: float) -> None:
    if (name, value) != ("rankme", math.inf) and (name, value) != ("target_std", math.inf):
        assert _judge(**{name: value})[0] == "collapsed"


def test_lidar_is_read_out_where_it_was_measured() -> None:
    assert _judge(lidar=31.24)[1].startswith("ok: RankMe 54.2 of 192, LiDAR 31.2, std 0.31")


def test_a_lost_training_loss_is_a_collapse() -> None:
    health = judge([STEP, {"step": 610, "train/loss": None}], "feature", 192)  # as metrics.jsonl writes NaN
    assert health.status == "collapsed"
    assert "clip_grad_norm" in health.line


def test_a_loss_that_rises_after_a_dip_is_normal() -> None:
    assert judge([STEP, END, END | {"step": 700, "monitor/loss": 0.6}], "feature", 192).status == "ok"


def test_a_bad_reading_in_the_past_does_not_matter() -> None:
    bad = END | {"step": 500, "monitor/rankme": None, "monitor/knn_top1": None, "monitor/loss": None}
    assert judge([START, bad, END], "feature", 192).status == "ok"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"action_gap": 0.0}, "ignores the action; deepen predictor.depth"),
        ({"action_gap": -0.01}, "ignores the action"),
        ({"action_gap": math.nan}, "ignores the action"),
        ({"rankme": 3.9}, "RankMe fell from 16.5 to 3.9"),
        ({"loss": 1.2}, "the loss rose from 1.000 before training to 1.200"),
        ({"knn_top1": 0.105}, "no better than the best constant answer"),
        ({"knn_top1": 0.19}, "kNN fell from 0.25 to 0.19"),
    ],
)
def test_what_did_not_happen_is_a_warning(changes: dict[str, float], words: str) -> None:
    status, line = _judge(**changes)
    assert status == "warn"
    assert words in line


def test_all_reasons_are_given() -> None:
    line = _judge(action_gap=0.0, rankme=3.0)[1]
    assert "ignores the action" in line
    assert "; also " in line
    assert "RankMe fell" in line


def test_skipped_steps_are_a_warning() -> None:
    health = judge([START, STEP | {"train/skipped_steps": 3.0}, END], "feature", 192)
    assert health.status == "warn"
    assert "3 steps were skipped" in health.line


def test_a_run_without_readings_says_so() -> None:
    assert (
        judge([STEP], "feature", 192).line == "warn: the monitors were never read; lower monitor.every_steps"
    )
    assert judge([], "feature", 192).status == "warn"


@pytest.mark.parametrize(
    ("rank", "spread", "knn", "status"),
    # Measured on CIFAR-10 (ViT 4 x 128 at 32 px): an untrained encoder, 600 good steps, a learning rate of 1e-2 with
    # momentum 0.9.
    [(16.5, 0.368, 0.245, "ok"), (14.2, 0.329, 0.272, "ok"), (3.8, 0.491, 0.204, "warn")],
)
def test_measured_runs(rank: float, spread: float, knn: float, status: str) -> None:
    assert _judge("none", rankme=rank, target_std=spread, knn_top1=knn, action_gap=0.0)[0] == status
