"""One sentence on whether a run is well, from the numbers it has already reported."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from iwm_ray.config import Conditioning

Status = Literal["ok", "warn", "collapsed"]

# Measured on small Vision Transformers (4 x 128 at 32 px; tests/evaluation/test_health.py holds the cases).
COLLAPSED_RANK = 1.5  # one direction holds the features; an untrained encoder has TODO
COLLAPSED_STD = 0.02  # of layer-normed tokens, whose channels spread by 1 within a token
LOST_RANK = 0.25  # a fall to this share of the best reading is no noise
IGNORED_ACTION = 0.01  # a gap below this share of the loss: the action changes next to nothing
RISEN_LOSS = 1.2  # moderate rises are normal: the targets grow richer while the encoder learns
LOST_KNN = 0.8  # a fall to this share of the best reading
_CONFIDENT = 1.2  # times chance: below it, the classes were not found


@dataclass(frozen=True)
class Health:
    """A verdict and its reasons."""

    status: Status
    """worst of what was found"""
    line: str
    """the status, a colon, and the reasons with what to change, in one line"""


def judge(history: Sequence[Mapping[str, float]], conditioning: Conditioning, width: int) -> Health:
    """Reads a run's metrics as a person would.

    Args:
        history: rows of metrics in the order of the steps (lines of metrics.jsonl); a row need not hold every metric.
        conditioning: how the action enters; with `none` no action gap is expected.
        width: token width of the encoder, the most that RankMe can reach.

    Returns:
        `collapsed` if the features are (nearly) the same for all images or the loss is lost, `warn` if something that
        should happen did not, otherwise `ok` with the last readings.
    """
    run = _Run(history)
    collapsed = _collapse(run, width)
    if collapsed:
        return Health("collapsed", f"collapsed: {collapsed}")
    warnings = [
        warning
        for warning in (
            _lost_rank(run, width),
            _ignored_action(run, conditioning),
            _risen_loss(run),
            _poor_neighbours(run),
            _skipped_steps(run),
            _unread(run),
        )
        if warning
    ]
    if warnings:
        return Health("warn", "warn: " + "; also ".join(warnings))
    return Health("ok", "ok: " + _readings(run, conditioning, width))
