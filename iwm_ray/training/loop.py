"""The training loop: one step, and the repetition of it. Plain torch: it runs with or without Ray.

The step reads nothing back from the device and draws nothing at random: the same state and batches give the
same bits.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from iwm_ray.batch import Batch
from iwm_ray.config import Config, RuntimeConfig
from iwm_ray.errors import RunError
from iwm_ray.model.encoder import fuse_attention
from iwm_ray.model.iwm import IWM, StepOutput
from iwm_ray.training import schedules
from iwm_ray.training.optimizer import apply_gradients, make_optimizer, set_rates

MAX_SKIPPED_IN_A_ROW = 10
"""non-finite steps in a row after which a run is beyond help"""


@dataclass
class TrainState:
    """All that a step changes; a checkpoint holds exactly this."""

    model: IWM
    optimizer: AdamW
    config: Config
    total_steps: int
    step: int
    """optimizer steps done"""
    skipped: Tensor
    """`[2]` int64 on the device: non-finite steps left out so far, and how many of them in a row up to now"""

    @classmethod
    def start(cls, model: IWM, config: Config, total_steps: int) -> "TrainState":
        """A run at step 0.

        Args:
            model: on the device where it will train.
            config: the whole run.
            total_steps: optimizer steps of the run, over which the schedules are laid out.
        """
        device = next(model.parameters()).device
        choose_attention(model, config.runtime, device)
        if config.runtime.compile:
            model.compile(dynamic=False)
        skipped = torch.zeros(2, dtype=torch.int64, device=device)
        return cls(model, make_optimizer(model, config.optimizer), config, total_steps, 0, skipped)

    @property
    def device(self) -> torch.device:
        return self.skipped.device

    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the model: all of it."""
        return self.model.state_dict()


@dataclass(frozen=True)
class StepStats:
    """What a step has to tell. Tensors stay on the device until `read`."""

    step: int
    """optimizer steps done, this one included"""
    loss: Tensor
    """scalar, of this worker's share of the batch"""
    grad_norm: Tensor
    """scalar, of the gradient of the whole batch, before clipping"""
    skipped: Tensor
    """`[2]`, see TrainState"""
    learning_rate: float
    weight_decay: float
    momentum: float
    counter: Tensor
    """`[b]` places in the stream of this worker's samples"""
    sample_loss: Tensor
    """`[b]`, of each of them"""
    data_wait: float = 0.0
    """seconds spent waiting for the batch"""

    def read(self) -> dict[str, float]:
        """Waits for the device and gives the step's numbers.

        Raises:
            RunError: too many steps in a row had to be left out.
        """
        loss, grad_norm, skipped, in_a_row = torch.stack(
            (self.loss, self.grad_norm, *self.skipped.double())
        ).tolist()
        if in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise RunError(
                f"loss or gradient was not finite in the last {in_a_row:.0f} steps up to step {self.step} "
                f"(loss {loss:g}, gradient norm {grad_norm:g}, learning rate {self.learning_rate:g}); "
                "lower optimizer.lr or set optimizer.clip_grad_norm"
            )
        return {
            "loss": loss,
            "grad_norm": grad_norm,
            "skipped_steps": skipped,
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "momentum": self.momentum,
            "data_wait": self.data_wait,
        }


class Forward(Protocol):
    """The model, or what wraps it (DDP)."""

    def __call__(self, batch: Batch) -> StepOutput: ...


Report = Callable[[TrainState, StepStats], bool | None]
"""Called after each step; True stops the loop. It chooses by `state.step` when to read the device."""


def fit(
    state: TrainState, batches: Iterator[Batch], until: int, report: Report, forward: Forward | None = None
) -> None:
    """Trains up to step `until`, or until `report` says to stop.

    Args:
        state: is changed in place.
        batches: this worker's shares of the global batches, from step `state.step` on; on any device.
        until: optimizer steps done at the end.
        report: see Report.
        forward: DDP around the model; by default the model itself.

    Raises:
        RunError: the batches end before the run.
    """
    state.model.train()
    while state.step < until:
        begin = time.monotonic()
        batch = next(batches, None)
        if batch is None:
            raise RunError(f"the data ended at step {state.step} of {until}")
        wait = time.monotonic() - begin
        stats = train_step(state, batch.to(state.device), forward or state.model)
        if report(state, replace(stats, data_wait=wait)):
            return


def train_step(state: TrainState, batch: Batch, forward: Forward) -> StepStats:
    """One optimizer step and one EMA step. A step with a non-finite loss or gradient changes nothing but its count."""
    optimizer, schedule, at = state.config.optimizer, state.config.schedule, (state.step, state.total_steps)
    learning_rate = schedules.learning_rate(*at, optimizer, schedule)
    weight_decay = schedules.weight_decay(*at, optimizer, schedule)
    momentum = schedules.momentum(*at, schedule)

    set_rates(state.optimizer, learning_rate, weight_decay)
    loss, sample_loss = _accumulate_gradients(state, batch, forward)
    grad_norm, skipped = apply_gradients(state.optimizer, optimizer.clip_grad_norm)
    state.optimizer.zero_grad()
    # Momentum 1 leaves the target encoder where it is.
    state.model.update_target(1 - (1 - momentum) * (1 - skipped.double()))
    state.skipped = torch.stack((state.skipped[0] + skipped, (state.skipped[1] + 1) * skipped)).long()
    state.step += 1
    return StepStats(
        state.step,
        loss,
        grad_norm,
        state.skipped,
        learning_rate,
        weight_decay,
        momentum,
        batch.counter,
        sample_loss,
    )


def autocast(config: RuntimeConfig, device: torch.device) -> torch.autocast:
    """The context in which forward passes run: bfloat16 matrix products, or nothing but float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_bfloat16(config, device))


def uses_bfloat16(config: RuntimeConfig, device: torch.device) -> bool:
    """Whether forward passes run in bfloat16 on that device."""
    return config.precision == "bf16" or (config.precision == "auto" and device.type != "cpu")


def choose_attention(model: nn.Module, config: RuntimeConfig, device: torch.device) -> None:
    """torch's fused attention, but not for bfloat16 on CPUs: there matmul and softmax are twice as fast."""
    fuse_attention(model, device.type != "cpu" or not uses_bfloat16(config, device))


def _accumulate_gradients(state: TrainState, batch: Batch, forward: Forward) -> tuple[Tensor, Tensor]:
    """Forward and backward, part by part; DDP's workers exchange gradients with the last part.

    Returns:
        the mean loss, and `[b]` that of each sample.
    """
    runtime = state.config.runtime
    parts = batch.split(runtime.accumulation_steps)
    losses, sample_losses = [], []
    for number, part in enumerate(parts, start=1):
        local = number < len(parts) and isinstance(forward, DistributedDataParallel)
        with forward.no_sync() if local else nullcontext():  # type: ignore[attr-defined]
            with autocast(runtime, state.device):
                output = forward(part)
            loss = output.loss / len(parts)
            # An overflown loss can have finite gradients; NaN makes every worker leave the step out.
            (loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)).backward()
        losses.append(loss.detach())
        sample_losses.append(output.sample_loss)
    return torch.stack(losses).sum(), torch.cat(sample_losses)
