"""Learning rate, weight decay and momentum: pure functions of the step, so that resuming needs no replay.

All are laid out over `stretch` x the run, which stops before they end (V-JEPA).
"""

import math

from iwm_ray.config import OptimizerConfig, ScheduleConfig


def learning_rate(step: int, total_steps: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """Rises linearly to the peak over the warm-up share of the run, then falls as a cosine to `lr_end`.

    Args:
        step: optimizer steps done, 0 to `total_steps` - 1.
        total_steps: length of the run.
    """
    peak, warmup = optimizer.peak_lr, schedule.warmup_fraction * total_steps
    if step < warmup:
        return peak * (schedule.lr_start_factor + (1 - schedule.lr_start_factor) * step / warmup)
    return _cosine(peak, schedule.lr_end, step - warmup, schedule.stretch * total_steps - warmup)


def weight_decay(step: int, total_steps: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """A cosine from `weight_decay` to `weight_decay_end`."""
    end = schedule.stretch * total_steps
    return _cosine(optimizer.weight_decay, optimizer.weight_decay_end, step, end)


def momentum(step: int, total_steps: int, schedule: ScheduleConfig) -> float:
    """The target encoder's EMA coefficient: linear from `momentum_start` to `momentum_end`."""
    share = step / (schedule.stretch * total_steps)
    return schedule.momentum_start + share * (schedule.momentum_end - schedule.momentum_start)


def _cosine(start: float, end: float, step: float, num_steps: float) -> float:
    """Half a cosine from `start` at step 0 to `end` at `num_steps`."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
