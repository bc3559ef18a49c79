"""One line on whether a run is well, from the numbers it has already reported."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from iwm_ray.config import Conditioning

# Measured: untrained encoders have RankMe 10 to 23 and std 0.36 to 0.41 (ViT 4 x 128 at 32 px, ViT-Ti and ViT-B at
# 224 px); runs that degraded (learning rate ten times too high, no momentum) RankMe 3 to 6 and std still 0.4, because
# targets are layer-normed. So rank is the first sign, and spread the last.
_COLLAPSED_RANK = 2.0  # hardly more than one direction is left
_COLLAPSED_STD = 0.02  # channels spread by 1 within a token, but all images have the same
_LOST_RANK = 0.25  # of the best reading; healthy runs dip to 0.7 of the untrained encoder's
_IGNORED_ACTION = 0.01  # of the loss; untrained predictors have 0.003, the first 30 steps bring 0.3
_RISEN_LOSS = 1.05  # of the untrained model's; a rise after a dip is normal, since targets grow richer
_LOST_KNN = 0.8  # of the best reading: beyond the noise of some hundred queries
_FOUND_CLASSES = 1.1  # of the best constant answer


@dataclass(frozen=True)
class Health:
    """A verdict, and its reasons in words."""

    status: Literal["ok", "warn", "collapsed"]
    line: str
    """the status, the reasons with their numbers, and which setting to change"""


def judge(history: Sequence[Mapping[str, float]], conditioning: Conditioning, width: int) -> Health:
    """Reads a run's metrics as a person would.

    Args:
        history: rows of metrics (lines of metrics.jsonl) in the order of the steps; rows may lack metrics.
        conditioning: how the action enters; with `none` no action gap is expected.
        width: token width of the encoder, the most that RankMe can reach.

    Returns:
        `collapsed` where features are (nearly) the same for all images or the loss is lost, `warn` where
        something that should happen did not, else `ok` with the last readings.
    """
    run = _Run(history, conditioning, width)
    if reason := run.collapse():
        return Health("collapsed", f"collapsed: {reason}")
    checks = (run.unread, run.lost_rank, run.ignored_action, run.risen_loss, run.lost_neighbors, run.skipped)
    reasons = [reason for check in checks if (reason := check())]
    if reasons:
        return Health("warn", "warn: " + "; also ".join(reasons))
    return Health("ok", "ok: " + run.readings())


@dataclass(frozen=True)
class _Run:
    """A run's readings. Each check returns its reason, or an empty string where all is well."""

    history: Sequence[Mapping[str, float]]
    conditioning: Conditioning
    width: int

    def series(self, name: str) -> list[float]:
        """All values of a metric; what was not a number in the log counts as NaN."""
        values = [row[name] for row in self.history if name in row]
        return [math.nan if value is None else float(value) for value in values]

    def best(self, name: str) -> float:
        return max(value for value in self.series(name) if math.isfinite(value))

    def collapse(self) -> str:
        # A single bad step of training is skipped and counted; the fixed batch of the monitors tells what is left.
        losses = self.series("monitor/loss") or self.series("train/loss")
        if losses and not math.isfinite(losses[-1]):
            return "the loss is not finite; lower optimizer.lr or set optimizer.clip_grad_norm"
        ranks, spreads = self.series("monitor/rankme"), self.series("monitor/target_std")
        if not ranks or not spreads:
            return ""
        if ranks[-1] >= _COLLAPSED_RANK and spreads[-1] >= _COLLAPSED_STD:
            return ""
        return (
            f"RankMe {ranks[-1]:.1f} of {self.width} and target std {spreads[-1]:.3f}: features are nearly "
            "constant; raise schedule.momentum_start or lower optimizer.lr"
        )

    def unread(self) -> str:
        if self.series("monitor/rankme"):
            return ""
        return "the monitors were never read; lower monitor.every_steps"

    def lost_rank(self) -> str:
        ranks = self.series("monitor/rankme")
        if not ranks or ranks[-1] >= _LOST_RANK * (best := self.best("monitor/rankme")):
            return ""
        return (
            f"RankMe fell from {best:.1f} to {ranks[-1]:.1f} of {self.width}: features lose "
            "directions; raise schedule.momentum_start or lower optimizer.lr"
        )

    def ignored_action(self) -> str:
        gaps, losses = self.series("monitor/action_gap"), self.series("monitor/loss")
        if self.conditioning == "none" or not gaps or not losses or gaps[-1] >= _IGNORED_ACTION * losses[-1]:
            return ""
        return (
            f"the action gap is {gaps[-1]:+.4f} beside a loss of {losses[-1]:.3f}: the predictor ignores the "
            "action; deepen predictor.depth, strengthen views.brightness, contrast, saturation, hue, or "
            "train longer"
        )

    def risen_loss(self) -> str:
        untrained = [
            row["monitor/loss"] for row in self.history if row.get("step") == 0 and "monitor/loss" in row
        ]
        losses = self.series("monitor/loss")
        if not untrained or losses[-1] <= _RISEN_LOSS * untrained[0]:
            return ""
        return (
            f"the loss rose from {untrained[0]:.3f} before training to {losses[-1]:.3f}; lower optimizer.lr"
        )

    def lost_neighbors(self) -> str:
        found, chance = self.series("monitor/knn_top1"), self.series("monitor/knn_chance")
        if not found or not chance:
            return ""
        if found[-1] < _FOUND_CLASSES * chance[-1]:
            return (
                f"kNN {found[-1]:.2f} is no better than the best constant answer, {chance[-1]:.2f}: features "
                "do not tell the classes apart; train longer or lower optimizer.lr"
            )
        if found[-1] < _LOST_KNN * (best := self.best("monitor/knn_top1")):
            return (
                f"kNN fell from {best:.2f} to {found[-1]:.2f}: features get worse; lower optimizer.lr "
                "or raise schedule.momentum_start"
            )
        return ""

    def skipped(self) -> str:
        counts = self.series("train/skipped_steps")
        if not counts or not counts[-1]:
            return ""
        return (
            f"{counts[-1]:.0f} steps were skipped because loss or gradient was not finite; lower "
            "optimizer.lr or set optimizer.clip_grad_norm"
        )

    def readings(self) -> str:
        """The last readings, for a run that is well."""
        rank, spread = self.series("monitor/rankme")[-1], self.series("monitor/target_std")[-1]
        found, chance = self.series("monitor/knn_top1"), self.series("monitor/knn_chance")
        gaps, lidars = self.series("monitor/action_gap"), self.series("monitor/lidar")
        parts = [f"RankMe {rank:.1f} of {self.width}", f"std {spread:.2f}"]
        if lidars:
            parts.insert(1, f"LiDAR {lidars[-1]:.1f}")
        if gaps and self.conditioning == "none":
            parts.append("invariant by construction (conditioning none)")
        elif gaps:
            parts.append(f"action gap {gaps[-1]:+.3f}")
        if found and chance:
            parts.append(f"kNN {found[-1]:.2f} (chance {chance[-1]:.2f})")
        return ", ".join(parts)
