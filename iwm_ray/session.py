"""One train worker's part in a pretraining: build, resume, fit, report, measure. It runs with or without Ray."""

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray
from torch import Tensor

from iwm_ray import action_log
from iwm_ray.batch import Batch
from iwm_ray.build import MEASURING_EPOCH, Setup, hold
from iwm_ray.data.decode import Undecodable
from iwm_ray.data.index import Index
from iwm_ray.errors import RunError
from iwm_ray.evaluation.monitors import Monitor
from iwm_ray.evaluation.mrr import measure_mrr
from iwm_ray.evaluation.pairs import draw_pairs
from iwm_ray.loader import to_batch, to_tensors
from iwm_ray.model.iwm import IWM, build_model
from iwm_ray.training import checkpoint, metrics_log
from iwm_ray.training.loop import StepStats, TrainState, autocast, fit
from iwm_ray.training.metrics_log import MetricsLog
from iwm_ray.workers import (
    OpenColumns,
    Outcome,
    Worker,
    agree_to_stop,
    begin,
    checkpoint_every,
    guarded,
    resume,
    shared,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NUM_SHEET_ROWS = 5
_LIDAR_IMAGES, _LIDAR_VIEWS = 64, 4  # a tenth of what a reading costs with the default kNN bank


def work(setup: Setup, worker: Worker, open_columns: OpenColumns) -> Outcome:
    """Trains from the newest valid checkpoint to the end, then measures; only rank 0 writes and measures."""
    return guarded(setup.run, worker, lambda: _work(setup, worker, open_columns))


def _work(setup: Setup, worker: Worker, open_columns: OpenColumns) -> Outcome:
    config = setup.config
    generation = begin(setup.run, worker, config.runtime)
    model = build_model(config, setup.policy.action_dim).to(worker.device)
    state = TrainState.start(model, config, setup.total_steps)
    resume(setup.run, worker, state)
    reporter = Reporter(setup, worker, state, generation)
    batches = _checked_batches(setup, worker, open_columns(state.step), state.step)
    fit(state, batches, setup.total_steps, reporter, shared(model, worker))
    if state.step < setup.total_steps:
        return Outcome("stopped", state.step)
    if worker.rank == 0:
        measure(setup, model, reporter)
    return Outcome("finished", state.step)


def _checked_batches(
    setup: Setup, worker: Worker, columns: Iterator[dict[str, Tensor]], step: int
) -> Iterator[Batch]:
    """Batches on the device; refuses rows that are not the ones that the plan names for this step."""
    size = setup.config.optimizer.global_batch_size
    for part in columns:
        steps = torch.unique(part["counter"] // size)
        if steps.tolist() != [step] or len(part["counter"].unique()) != size // worker.count:
            raise RuntimeError(f"step {step} was handed rows of steps {steps.tolist()}")
        yield to_batch(part, setup.policy, worker.device)
        step += 1


class Reporter:
    """What happens between steps: metrics, monitors, checkpoints, and the decision to stop."""

    def __init__(self, setup: Setup, worker: Worker, state: TrainState, generation: int) -> None:
        config, total = setup.config, setup.total_steps
        self._setup, self._worker, self._generation = setup, worker, generation
        self._monitor_every = config.monitor.every_steps or max(1, total // 10)
        self._checkpoint_every = checkpoint_every(config.runtime, total)
        self._quality: float | None = None
        self._losses: list[tuple[Tensor, Tensor]] = []
        self._clock = _Clock()
        if worker.rank == 0:
            self.log = MetricsLog(setup.run.metrics)
            self.monitor = make_monitor(setup, worker.device)
            if state.step == 0:
                self._read_monitors(state)
        self._clock = _Clock()  # the first rate is that of steps, not of the start

    def __call__(self, state: TrainState, stats: StepStats) -> bool:
        """Called after each step, on every worker; True stops the run."""
        self._clock.add_step(stats.data_wait)
        self._quality = None
        last = state.step == self._setup.total_steps
        if state.step % self._setup.config.monitor.report_every_steps == 0 or last:
            self._report(stats)
        if self._worker.rank == 0 and (state.step % self._monitor_every == 0 or last):
            self._read_monitors(state)
        stop = self._agree_to_stop(state.step)
        if state.step % self._checkpoint_every == 0 or last or stop:
            self._write_losses(state.step)
            if self._worker.rank == 0:
                self._save(state)
        return stop

    def _report(self, stats: StepStats) -> None:
        self._losses.append((stats.counter, stats.sample_loss))
        stats = replace(stats, loss=self._worker.mean(stats.loss))
        values = stats.read()
        rate, wait = self._clock.lap(self._setup.config.optimizer.global_batch_size)
        if self._worker.rank == 0:
            train = {
                "train/loss": values["loss"],
                "train/lr": values["learning_rate"],
                "train/weight_decay": values["weight_decay"],
                "train/momentum": values["momentum"],
                "train/grad_norm": values["grad_norm"],
                "train/skipped_steps": values["skipped_steps"],
                "train/samples_per_second": rate,
                "train/data_wait_fraction": wait,
            }
            self._log(stats.step, train)
            self._refuse_bad_data()

    def _write_losses(self, step: int) -> None:
        """Adds to the action log what the samples of the reported steps cost."""
        if not self._losses or not self._setup.config.tracking.action_log_fraction:
            return
        counters, losses = (torch.cat(columns).cpu().numpy() for columns in zip(*self._losses, strict=True))
        self._losses.clear()
        noted = {"counter": counters, "loss": losses}
        try:
            action_log.write_losses(self._setup.run.actions, step, self._worker.rank, noted)
        except OSError as error:
            self._setup.run.warn(f"action log: losses up to step {step} not written ({error.strerror})")

    def _read_monitors(self, state: TrainState) -> None:
        with self._clock.paused():
            begin = time.monotonic()
            with autocast(self._setup.config.runtime, self._worker.device):
                values = self.monitor.read(state.model)
            values["monitor/seconds"] = time.monotonic() - begin
            # The best checkpoint is the one with the best features; without labels their rank stands in.
            self._quality = values.get("monitor/knn_top1", values["monitor/rankme"])
            self._log(state.step, values)

    def _log(self, step: int, values: dict[str, float]) -> None:
        """A worker that is only thought dead must not write between the lines of the one that replaced it."""
        checkpoint.refuse_older_generation(self._setup.run.checkpoints, self._generation)
        self.log.append(step, values)

    def _save(self, state: TrainState) -> None:
        with self._clock.paused():
            self.log.sync()  # a checkpoint must not outlive the metrics of the steps before it
            saved = checkpoint.save(self._setup.run.checkpoints, state, {}, self._generation, self._quality)
            if saved.warning:
                self._setup.run.warn(saved.warning)

    def _agree_to_stop(self, step: int) -> bool:
        if self._worker.count > 1 and step % self._setup.config.monitor.report_every_steps:
            return False  # a report waits for the device anyway
        return agree_to_stop(self._setup.run.stop_request, self._worker)

    def _refuse_bad_data(self) -> None:
        run, data = self._setup.run, self._setup.config.data
        bad, count = run.num_quarantined(), len(self._setup.feed.index)
        if bad > max(1, data.max_bad_fraction * count):
            examples = ", ".join(record["path"] for record in run.quarantined()[:5])
            raise RunError(
                f"{bad} of {count} samples can't be decoded, more than data.max_bad_fraction "
                f"{data.max_bad_fraction:g}: {examples}; see {run.quarantine}; mend them, or begin another run with a "
                "larger data.max_bad_fraction"
            )


def make_monitor(setup: Setup, device: torch.device) -> Monitor:
    """The fixed inputs of the monitors: images with their views, and the kNN's bank.

    Without `data.test_path` both are training images: a quarter of them at most is asked, the rest is the bank.
    """
    config, train = setup.config.monitor, setup.feed.index
    if setup.test_index:
        asked, count, offset = setup.test_index, config.num_images, 0
    else:
        asked, count = train, max(2, min(config.num_images, len(train) // 4))
        offset = count
    queries = hold(setup, asked, count, "monitor")
    bank = hold(setup, train, config.num_bank_images, "monitor", offset) if len(train) - offset >= 2 else None
    few, seed = slice(_LIDAR_IMAGES), setup.config.seed
    pairs = draw_pairs(setup.policy, queries.images[few], queries.samples[few], seed, _LIDAR_VIEWS)
    return Monitor(
        batch=measuring_batch(setup, asked, queries.samples, device),
        query_images=_channels_first(queries.images),
        query_labels=torch.from_numpy(queries.labels),
        bank_images=None if bank is None else _channels_first(bank.images),
        bank_labels=None if bank is None else torch.from_numpy(bank.labels),
        num_neighbors=config.num_neighbors,
        seed=seed,
        lidar_views=pairs.target,
    )


def measuring_batch(setup: Setup, index: Index, samples: np.ndarray, device: torch.device) -> Batch:
    """Views, masks and actions of chosen samples, drawn under an epoch that training never reaches."""
    feed = replace(setup.feed, index=index, log=None, quarantine=None)
    epochs = np.full(len(samples), MEASURING_EPOCH, np.int64)
    return to_batch(to_tensors(feed.make(samples, epochs, samples)), setup.policy, device)


def measure(setup: Setup, model: IWM, reporter: Reporter) -> None:
    """The closing measurements and the pictures."""
    # Only rank 0 draws, and only at the end: the workers start sooner without matplotlib.
    from iwm_ray.pictures.curves import training_curves

    with autocast(setup.config.runtime, next(model.parameters()).device):
        metrics = _measure_world_model(setup, model)
        features = reporter.monitor.read(model)
    knn = [name for name in ("top1", "chance") if f"monitor/knn_{name}" in features]
    metrics |= {f"knn/{name}": features[f"monitor/knn_{name}"] for name in knn}
    reporter.log.append(setup.total_steps, metrics)
    seen = setup.feed.plan.samples(np.arange(_NUM_SHEET_ROWS))
    _draw(setup, "views", draw_views(setup, np.zeros_like(seen), seen, "Views, masks and actions"))
    rows = metrics_log.read(setup.run.metrics)
    _draw(setup, "curves", training_curves(rows, f"Training curves of {setup.config.recipe}"))


def _measure_world_model(setup: Setup, model: IWM) -> dict[str, float]:
    """MRR and its gallery; nothing where the views know no jitter, so that no two of a bank would differ, or where
    pixels are predicted, which no bank of tokens holds."""
    from iwm_ray.pictures.retrieval import retrieval_gallery

    config, policy = setup.config, setup.policy
    if config.predictor.target == "pixels" or not any(field.scale for field in policy.target_jitter.fields):
        return {}
    held = hold(setup, setup.test_index or setup.feed.index, config.monitor.mrr_images, "mrr")
    mrr = measure_mrr(model, held.images, policy, seed=config.seed, num_views=config.monitor.mrr_views)
    _draw(setup, "retrieval", retrieval_gallery(mrr, held.images, policy, config.predictor.conditioning))
    return mrr.metrics


def draw_views(setup: Setup, epochs: NDArray[np.int64], samples: NDArray[np.int64], title: str) -> "Figure":
    """What training sees of `[k]` samples in these epochs; a row for each that can be decoded, one at least."""
    from iwm_ray.pictures.sheets import views_sheet

    feed = setup.feed
    images = {}
    for place, sample in enumerate(samples):
        with suppress(Undecodable):
            images[place] = feed.image(int(sample))
    places = np.array(list(images), np.int64)
    heights, widths = (np.array([image.shape[axis] for image in images.values()]) for axis in (0, 1))
    draws = setup.policy.draw(setup.config.seed, epochs[places], samples[places], heights, widths)
    crops = [setup.policy.crop(image, draws, row) for row, image in enumerate(images.values())]
    masks = feed.masks.draw(setup.config.seed, epochs[places], samples[places])
    return views_sheet(np.stack(crops), draws, masks, setup.policy, setup.config.grid, title)


def _draw(setup: Setup, name: str, figure: "Figure") -> None:
    figure.savefig(setup.run.pictures / f"{name}.png", dpi=150)


def _channels_first(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


class _Clock:
    """Time spent on steps, without the pauses for monitors and checkpoints."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._steps, self._wait, self._pause = 0, 0.0, 0.0
        self._started = False

    def add_step(self, wait: float) -> None:
        """The wait for the first batch is the start of the data processes, not a step's."""
        if not self._started:
            self._started = True
            self._pause += wait
            wait = 0.0
        self._steps += 1
        self._wait += wait

    def paused(self) -> "_Pause":
        return _Pause(self)

    def add_pause(self, seconds: float) -> None:
        self._pause += seconds

    def lap(self, samples_per_step: int) -> tuple[float, float]:
        """(samples a second, share of the time spent waiting for data) since the last lap."""
        now = time.monotonic()
        seconds = max(now - self._begin - self._pause, 1e-9)
        rate, wait = self._steps * samples_per_step / seconds, self._wait / seconds
        self._begin, self._steps, self._wait, self._pause = now, 0, 0.0, 0.0
        return rate, wait


class _Pause:
    def __init__(self, clock: _Clock) -> None:
        self._clock = clock

    def __enter__(self) -> None:
        self._begin = time.monotonic()

    def __exit__(self, *exception: object) -> None:
        self._clock.add_pause(time.monotonic() - self._begin)
