"""A training on a Ray cluster: Ray Data makes the rows, Ray Train runs the workers."""

import shutil
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import numpy as np
import ray.train
from ray.data import Dataset
from ray.data.collate_fn import NumpyBatchCollateFn
from ray.exceptions import RayError
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device
from ray.train.v2.api.exceptions import TrainingFailedError
from torch import Tensor

from iwm_ray.loader import to_tensors
from iwm_ray.runtime.pipeline import Layout, execution_options, stream
from iwm_ray.workers import AnyTraining, Outcome, Training, Work, Worker, resume_step

_PREFETCH_BATCHES = 4


def train_on_ray(training: AnyTraining, work: Work[AnyTraining]) -> Outcome:
    """Runs the train workers to the end; lost workers are replaced and go on from the newest valid checkpoint.

    Ray is told of no checkpoints: the run directory's own are verified, named by step, and outlive Ray's records.

    Args:
        training: what is trained; we are connected to the cluster.
        work: a worker's part; travels by its name.

    Returns:
        how it ended; `failed` where the workers failed more often than `runtime.max_failures`.
    """
    runtime, storage = training.runtime, training.run.path / "ray"
    scaling = ScalingConfig(
        num_workers=runtime.num_workers,
        use_gpu=runtime.use_gpu,
        resources_per_worker={"CPU": runtime.cpus_per_worker} | ({"GPU": 1} if runtime.use_gpu else {}),
    )
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"training": training, "work": work},
        scaling_config=scaling,
        run_config=RunConfig(
            name=f"attempt-{uuid4().hex[:8]}",
            storage_path=str(storage.absolute()),
            failure_config=FailureConfig(max_failures=runtime.max_failures),
        ),
        datasets={} if training.feed is None else {"train": lambda: _rest(training)},
        dataset_config=DataConfig(execution_options=execution_options(runtime)),
    )
    try:
        outcome = trainer.fit().return_value
    except (TrainingFailedError, RayError) as error:
        note = training.run.failure
        return Outcome("failed", -1, note.read_text() if note.exists() else _cause(error))
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    assert isinstance(outcome, Outcome)
    return outcome


class _ToTensors(NumpyBatchCollateFn):
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Tensor]:
        return to_tensors(batch)


def _train_worker(arguments: dict[str, Any]) -> Outcome:
    training: Training = arguments["training"]
    context = ray.train.get_context()
    worker = Worker(context.get_world_rank(), context.get_world_size(), get_device())

    def open_columns(step: int) -> Iterator[dict[str, Tensor]]:
        shard = ray.train.get_dataset_shard("train")
        for _ in range(_layout(training, step).num_segments):
            yield from shard.iter_torch_batches(
                batch_size=training.batch_size // worker.count,
                prefetch_batches=_PREFETCH_BATCHES,
                collate_fn=_ToTensors(),
                device="cpu",
                pin_memory=worker.device.type == "cuda",
            )

    outcome = arguments["work"](training, worker, open_columns)
    assert isinstance(outcome, Outcome)
    return outcome


def _rest(training: Training) -> Dataset:
    """The stream from where the newest checkpoint ends."""
    assert training.feed is not None
    return stream(training.feed, _layout(training, resume_step(training.run.checkpoints)))


def _layout(training: Training, step: int) -> Layout:
    """The rest of the run, from a step on; the driver and all workers must cut it alike."""
    assert training.feed is not None
    num_workers = training.runtime.num_workers
    return Layout.of(training.feed, training.batch_size, num_workers, step, training.total_steps)


def _cause(error: BaseException) -> str:
    """The last line of the innermost failure that Ray reports."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"the train workers failed: {lines[-1] if lines else type(error).__name__}"
