"""Training of one arm: a step, its repetition, and what happens between steps; the same bits for the same seed.

The loss is a mean over the whole batch, wherever its rows lie, and all draws belong to places in the batch: the result
does not depend on the number of workers, but for the order in which numbers are summed.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from iwm_ray.config import _Part, flat
from iwm_ray.errors import RunError
from iwm_ray.evaluation.features import digest, model_device
from iwm_ray.finetuning.model import Start, Tuned, parameter_groups
from iwm_ray.finetuning.settings import TuningConfig
from iwm_ray.run_directory import RunDirectory
from iwm_ray.training import checkpoint
from iwm_ray.training.loop import autocast, choose_attention
from iwm_ray.training.metrics_log import MetricsLog
from iwm_ray.training.optimizer import expected_moments, set_moments
from iwm_ray.workers import Worker, agree_to_stop, checkpoint_every

REPORT_EVERY_STEPS = 10

Columns = dict[str, Tensor]


class DivergedError(RunError):
    """The loss is not finite."""


class Objective(Protocol):
    """What an arm is trained for."""

    def count(self, columns: Columns) -> Tensor:
        """Over how much of these rows the loss is a mean, a scalar."""
        ...

    def loss(self, tuned: Tuned, forward: nn.Module, columns: Columns, step: int) -> Tensor:
        """The sum of the loss over these rows, a scalar.

        Args:
            tuned: the network.
            forward: the same, or DDP around it: what is called.
            columns: on the network's device; `counter` says where in the batch they stand.
            step: optimizer steps done.
        """
        ...


class ArmRecord(_Part):
    """Which arm a checkpoint belongs to."""

    tuning: str
    """names checkpoint, data and settings"""
    arm: str

    def hash(self) -> str:
        """Names both."""
        return digest(self.tuning, self.arm)

    def flat(self) -> dict[str, Any]:
        """Both, for messages."""
        return flat(self.model_dump())


@dataclass(frozen=True)
class Fitted:
    """What a training cost."""

    loss: float
    """mean of the last tenth of the steps"""
    num_images: int
    seconds: float
    """of the steps, all attempts together"""
    peak_memory: int
    """bytes: the most on the GPU where there is one; else parameters, gradients, moments, and what one step saves for its
    backward pass"""


@dataclass
class TuneState:
    """All that a step changes; a checkpoint holds exactly this, without an encoder that stays as it is."""

    model: Tuned
    optimizer: AdamW
    tuning: TuningConfig
    lr: float
    config: ArmRecord
    total_steps: int
    step: int
    """optimizer steps done"""
    skipped: Tensor
    """`[2]` zeros: no step is left out, and a loss that is not finite ends the arm"""
    losses: list[Tensor]
    """of the steps done in the last tenth"""
    seconds: float
    """of earlier attempts"""
    memory: "Memory"

    @classmethod
    def start(
        cls, tuned: Tuned, tuning: TuningConfig, start: Start, lr: float, record: ArmRecord, total_steps: int
    ) -> "TuneState":
        """An arm at step 0, on the device where the network lies.

        Args:
            tuned: the network.
            tuning: rates and runtime.
            start: of the predictor (see parameter_groups).
            lr: peak rate of what starts at random.
            record: names the arm.
            total_steps: length of the schedule.
        """
        optimizer = AdamW(parameter_groups(tuned, tuning, start), betas=(0.9, 0.999), fused=True)
        # From the first step on there are moments of all heads, also of those whose tasks have their turn later.
        zeros = {name: torch.zeros(each.shape) for name, each in expected_moments(tuned).items()}
        set_moments(optimizer, tuned, zeros)
        if tuning.runtime.compile:
            tuned.compile(dynamic=False)
        device = model_device(tuned)
        choose_attention(tuned, tuning.runtime, device)
        skipped = torch.zeros(2, dtype=torch.int64, device=device)
        memory = Memory(device)
        return cls(tuned, optimizer, tuning, lr, record, total_steps, 0, skipped, [], 0.0, memory)

    @property
    def device(self) -> torch.device:
        return self.skipped.device

    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the network."""
        return self.model.own_state()

    def recall(self, extra: Mapping[str, Any]) -> None:
        """Takes up what an earlier attempt has noted beside weights and moments."""
        self.losses = [torch.tensor(loss, device=self.device) for loss in extra["losses"]]
        self.seconds = extra["seconds"]
        self.memory.peak_bytes = extra["peak_memory"]


def fit(
    state: TuneState,
    batches: Iterator[Columns],
    objective: Objective,
    forward: nn.Module,
    worker: Worker,
    between: Callable[[TuneState, Tensor], bool],
) -> None:
    """Trains what is not frozen to the end of the schedule, or until `between` says to stop.

    Args:
        state: is changed in place.
        batches: this worker's rows of each step, from step `state.step` on.
        objective: what is trained for.
        forward: the network, or DDP around it.
        worker: this one.
        between: called after each step with the loss of the whole batch.
    """
    state.model.train()
    while state.step < state.total_steps:
        columns = next(batches)
        moved = {name: values.to(state.device, non_blocking=True) for name, values in columns.items()}
        loss = tune_step(state, moved | {"counter": columns["counter"]}, objective, forward, worker)
        if between(state, loss):
            return


def tune_step(
    state: TuneState, columns: Columns, objective: Objective, forward: nn.Module, worker: Worker
) -> Tensor:
    """One optimizer step; gives the loss of the whole batch."""
    tuning, runtime = state.tuning, state.tuning.runtime
    rate = state.lr * rate_share(state.step, state.total_steps, tuning.warmup_fraction)
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    # Heads of other tasks have no gradient at all: neither moments nor weight decay touch them.
    state.optimizer.zero_grad(set_to_none=True)
    share = worker.count / worker.sum(objective.count(columns)).clamp(min=1)
    parts = _split(columns, runtime.accumulation_steps)
    loss = torch.zeros((), device=state.device)
    for number, part in enumerate(parts, start=1):
        local = number < len(parts) and isinstance(forward, DistributedDataParallel)
        with forward.no_sync() if local else nullcontext():  # type: ignore[operator]
            with autocast(runtime, state.device), state.memory.watch(state.model):
                part_loss = objective.loss(state.model, forward, part, state.step) * share
            part_loss.backward()
        loss += part_loss.detach()
    if tuning.clip_grad_norm:
        trained = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
        nn.utils.clip_grad_norm_(trained, tuning.clip_grad_norm)
    state.optimizer.step()
    state.step += 1
    return worker.mean(loss)


def rate_share(step: int, num_steps: int, warmup_fraction: float) -> float:
    """The learning rate as a share of its peak: a linear rise, then half a cosine to 0."""
    warmup = warmup_fraction * num_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, num_steps - warmup)))


def _split(columns: Columns, num_parts: int) -> list[Columns]:
    parts = {name: values.chunk(num_parts) for name, values in columns.items()}
    return [{name: parts[name][number] for name in parts} for number in range(len(parts["counter"]))]


class Between:
    """What happens between steps: metrics, checkpoints, and the decision to stop.

    Args:
        run: the arm's folder.
        stop_request: the file that asks for a stop.
        worker: rank 0 alone writes.
        state: where the training begins or goes on.
        batch_size: images of a step, over all workers.
        generation: of this attempt.
        refuse: raises RunError where the data are too bad to go on.
    """

    def __init__(
        self,
        run: RunDirectory,
        stop_request: RunDirectory,
        worker: Worker,
        state: TuneState,
        batch_size: int,
        generation: int,
        refuse: Callable[[], None],
    ) -> None:
        self._refuse = refuse
        self._run, self._stop_request, self._worker = run, stop_request.stop_request, worker
        self._size, self._generation = batch_size, generation
        self._every = checkpoint_every(state.tuning.runtime, state.total_steps)
        self._first_of_last = state.total_steps - max(1, state.total_steps // 10)
        self._begin, self._pause = time.monotonic(), 0.0
        self._lap = (self._begin, 0.0, state.step)
        if worker.rank == 0:
            self._log = MetricsLog(run.metrics)

    def __call__(self, state: TuneState, loss: Tensor) -> bool:
        """Called after each step, on every worker; True stops the training."""
        is_last = state.step == state.total_steps
        reports = state.step % REPORT_EVERY_STEPS == 0 or is_last
        if state.step > self._first_of_last:
            state.losses.append(loss)
        if reports:
            self._report(state, float(loss))
        can_stop = reports or self._worker.count == 1
        stop = can_stop and agree_to_stop(self._stop_request, self._worker)
        if state.step % self._every == 0 or is_last or stop:
            self._refuse_non_finite(state, float(loss))
            if self._worker.rank == 0:
                self._save(state)
        return stop

    def fitted(self, state: TuneState) -> Fitted:
        """What the training has cost up to now."""
        last = float(torch.stack(state.losses).mean())
        return Fitted(last, state.step * self._size, self._seconds(state), state.memory.peak())

    def _refuse_non_finite(self, state: TuneState, loss: float) -> None:
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is {loss} after {state.step} steps at --lr {state.lr:g}; lower it")

    def _report(self, state: TuneState, loss: float) -> None:
        self._refuse_non_finite(state, loss)
        rate = state.optimizer.param_groups[0]["lr"] / state.optimizer.param_groups[0]["scale"]
        now, (before, pause, step) = time.monotonic(), self._lap
        seconds = max(now - before - (self._pause - pause), 1e-9)
        self._lap = (now, self._pause, state.step)
        if self._worker.rank == 0:
            checkpoint.refuse_older_generation(self._run.checkpoints, self._generation)
            per_second = (state.step - step) * self._size / seconds
            metrics = {"train/loss": loss, "train/lr": rate, "train/samples_per_second": per_second}
            self._log.append(state.step, metrics)
            self._refuse()

    def _save(self, state: TuneState) -> None:
        begin = time.monotonic()
        self._log.sync()  # a checkpoint must not outlive the metrics of the steps before it
        extra = {
            "losses": [float(loss) for loss in state.losses],
            "seconds": self._seconds(state),
            "peak_memory": state.memory.peak(),
        }
        saved = checkpoint.save(self._run.checkpoints, state, extra, self._generation)
        if saved.warning:
            self._run.warn(saved.warning)
        self._pause += time.monotonic() - begin

    def _seconds(self, state: TuneState) -> float:
        return state.seconds + time.monotonic() - self._begin - self._pause


class Memory:
    """What training needs: on a GPU the most that was allocated.

    On CPUs, where the process holds much else (libraries, data, what earlier arms have left), it is counted at the first
    step: parameters, gradients, moments, and what the forward pass saves.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self.peak_bytes = device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def watch(self, tuned: nn.Module) -> AbstractContextManager[object]:
        """Within it a forward pass of the network is made."""
        is_known = self._device.type == "cuda" or self.peak_bytes
        return nullcontext() if is_known else self._count(tuned)

    @contextmanager
    def _count(self, tuned: nn.Module) -> Iterator[None]:
        own, saved = _storages(tuned.parameters()), {}

        def note(tensor: Tensor) -> Tensor:
            saved.update(_storages([tensor]))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            yield
        trained = _storages(each for each in tuned.parameters() if each.requires_grad)
        activations = {place: size for place, size in saved.items() if place not in own}
        # Each trained parameter has a gradient and two moments.
        self.peak_bytes = sum(own.values()) + 3 * sum(trained.values()) + sum(activations.values())

    def peak(self) -> int:
        """Bytes."""
        now = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0
        return max(now, self.peak_bytes)


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Where the memory of tensors begins -> its bytes; what tensors share stands there once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
