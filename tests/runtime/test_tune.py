"""Sweeps that really run under Ray Tune, and what no fault may change about them."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray.util.placement_group import placement_group_table

from iwm_ray import sweep
from iwm_ray.cli import parse_pretrain
from iwm_ray.config import Config
from iwm_ray.errors import UsageError
from iwm_ray.finetuning.settings import FinetuneConfig
from iwm_ray.run_directory import read_lines
from iwm_ray.runtime import tune
from iwm_ray.runtime.cluster import Asked, Node
from iwm_ray.sweep import main
from iwm_ray.sweeping.job import Job
from iwm_ray.sweeping.record import DONE, SweepDirectory
from iwm_ray.sweeping.space import Axis, Sweep
from iwm_ray.training import checkpoint, metrics_log

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 300  # seconds; guards against hanging, measures nothing
MEASURED = {"images": 8, "views": 8, "train_images": 60, "test_images": 30, "tasks": ("mrr",)}


def cpu_node(name: str, cpus: float, gpus: float = 0) -> Node:
    return Node(name, cpus, gpus)


def test_trials_leave_room_for_their_data_tasks():
    torch_trainer = Asked(num_workers=2, cpus=1, gpus=0, data_cpus=1)
    assert tune.fit([cpu_node("a", 8)], torch_trainer, 10) == 2  # three would need 9 CPUs
    assert tune.fit([cpu_node("a", 9)], torch_trainer, 10) == 3
    assert tune.fit([cpu_node("a", 9)], torch_trainer, 2) == 2
    assert tune.fit([cpu_node("a", 2)], torch_trainer, 10) == 0


def test_small_trials_share_a_gpu():
    quarter = Asked(num_workers=1, cpus=1, gpus=0.25, data_cpus=0)
    assert tune.fit([cpu_node("a", 16, 1)], quarter, 10) == 4
    assert tune.fit([cpu_node("a", 3, 1)], quarter, 10) == 3
    assert tune.fit([cpu_node("a", 16, 2)], quarter, 10) == 8


def test_a_share_of_a_gpu_is_a_whole_part_of_it():
    with pytest.raises(UsageError, match="--gpus-per-trial 0.3"):
        tune.make_room(Config(recipe="photos_tiny"), 0.3, 1)


def test_a_new_failure_has_its_own_reason(tmp_path):
    """Two commands: the first trial's process noted a failure; in the second it dies without a word, twice."""
    axes = (Axis.of("seed", 0),)
    found = Sweep("test", "?", Config(recipe="photos_tiny"), axes)
    job = Job(found, found.trials()[0], SweepDirectory(tmp_path), {})
    job.directory.note_failure(job.trial, "ValueError: of yesterday")
    said: list[str] = []
    lines = tune._Lines(job, 1, 2, said.append)
    died = SimpleNamespace(
        trial_id="1", config={"point": job.trial.point}, get_error=lambda: "WorkerDied: killed"
    )
    lines.on_trial_start(0, [], died)
    lines.on_trial_recover(0, [], died)
    assert job.directory.failures()[job.trial.hash]["attempts"] == 2
    job.directory.note_failure(job.trial, "OSError: no space")  # the trial names this one itself
    lines.on_trial_error(0, [], died)
    assert [line.rpartition("seed=0: ")[2] for line in said] == [
        "attempt 1 of 2 failed: WorkerDied: killed",
        "attempt 2 of 2 failed: OSError: no space",
    ]
    assert job.directory.failures()[job.trial.hash]["attempts"] == 3


@pytest.fixture
def run_sweep(tiny_command, monkeypatch):
    """`run_sweep(output, axes, words, changes, finetune)`: runs a tiny sweep as its command does; gives the exit code."""
    monkeypatch.setitem(sweep._JUDGED, "train/momentum", "max")  # a metric whose value is known

    def run(output: Path, axes: tuple[Axis, ...], words=(), changes=None, finetune=None) -> int:
        options = {"--runtime.engine": "local"} | (changes or {})
        config = parse_pretrain(tiny_command(output, options))[0].config

        def define(size: str) -> Sweep:
            sweep = Sweep("test", "Does it work?", config, axes)
            measure = sweep.measure.model_copy(update=MEASURED)
            return Sweep("test", "Does it work?", config, axes, measure, finetune=finetune)

        with pytest.raises(SystemExit) as ended:
            main(define, ["--output", str(output), *words])
        return int(ended.value.code)

    return run


@pytest.fixture
def tune_errors():
    """What Ray Tune logs as errors; its loggers hand nothing on to those that pytest reads."""
    found: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: found.append(record.getMessage())
    logging.getLogger("ray.tune").addHandler(handler)
    yield found
    logging.getLogger("ray.tune").removeHandler(handler)


def attempts(directory: SweepDirectory, trial_hash: str) -> int:
    return len(read_lines(directory.run(trial_hash).attempts))


def assert_nothing_is_left() -> None:
    """No placement group, no reserved CPU."""
    until = time.monotonic() + 60
    while True:
        groups = {group["state"] for group in placement_group_table().values()}
        free = ray.available_resources().get("CPU", 0)
        if groups <= {"REMOVED"} and free == ray.cluster_resources()["CPU"]:
            return
        assert time.monotonic() < until, (groups, free)
        time.sleep(0.2)


@pytest.mark.ray
@pytest.mark.slow
def test_a_failing_trial_is_named_and_the_rest_is_done_once(
    ray_cluster, run_sweep, tmp_path, capsys, tune_errors
):
    """Two commands: one trial can't write and fails twice; it is mended, and alone run again."""
    directory = SweepDirectory(tmp_path / "sweep")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    axes = (Axis.of("predictor.conditioning", "none"), Axis.of("seed", 0, 1))
    changes = {"--schedule.steps": 8, "--tracking.uri": uri, "--data.path": "photos_tiny"}
    changes |= {"--data.test-path": "photos_tiny:test"}
    tuned = FinetuneConfig(steps=2, seeds=(0,))

    directory.path.mkdir()
    assert run_sweep(directory.path, axes, ["--dry-run"], changes) == 0
    assert "trials     2, 0 of them done" in capsys.readouterr().out
    assert list(directory.path.iterdir()) == []

    blocked = _hash(directory, run_sweep, axes, changes, capsys)
    blocked.parent.mkdir()
    blocked.write_text("in the way")
    assert run_sweep(directory.path, axes, (), changes, tuned) == 1
    said = capsys.readouterr()
    reason = f"{blocked}: is a file where the trial's folder belongs; remove it"
    title = "predictor.conditioning=none seed=1"
    assert "1 trial failed" in said.err and f"{title}: {reason}" in said.err
    assert f"again {title}: attempt 1 of 2 failed: {reason}" in said.out
    assert f"/2 {title}: attempt 2 of 2 failed: {reason}" in said.out
    assert tune_errors == []  # no tracebacks of Ray's
    assert directory.failures()[blocked.name]["attempts"] == 2
    done = next(path.name for path in directory.runs())

    blocked.unlink()
    assert run_sweep(directory.path, axes, (), changes, tuned) == 0
    said = capsys.readouterr().out
    assert "trials     2, 1 of them done" in said
    assert directory.failures() == {}
    assert attempts(directory, done) == 1
    assert {directory.training(path.name) for path in directory.runs()} == {"finished"}
    assert "1 configuration with 2 seeds; 2 of 2 trials are finished." in said
    assert directory.seconds(done)["train"] > 0
    summary = json.loads(directory.run(done).summary.read_text())
    assert "mrr/mrr_low" in summary["metrics"]
    assert_nothing_is_left()
    _assert_children(uri, 2)


def _hash(directory, run_sweep, axes, changes, capsys) -> Path:
    """The run directory of the second trial: its configuration is that of the first with another seed."""
    from iwm_ray.sweeping import space

    found = []
    original = space.Sweep.trials
    space.Sweep.trials = lambda sweep: found.append(original(sweep)) or found[-1]
    try:
        assert run_sweep(directory.path, axes, ["--dry-run"], changes) == 0
    finally:
        space.Sweep.trials = original
    capsys.readouterr()
    return directory.run(found[0][1].hash).path


def _assert_children(uri: str, count: int) -> None:
    """One parent with the report; the trials are its children, with seed and group."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    (experiment,) = [each for each in client.search_experiments() if each.name == "iwm_ray"]
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == count and len(runs) == count + 1  # arms of the finetuning have none
    assert all("finetune/photos_tiny/top1" in child.data.metrics for child in children)
    assert {child.data.tags["iwm.seed"] for child in children} == {"0", "1"}
    assert {child.data.tags["iwm.group"] for child in children} == {"conditioning=none"}
    assert parent.data.metrics["sweep/finished"] == count
    assert "report/report.html" in [file.path for file in client.list_artifacts(parent.info.run_id, "report")]


@pytest.mark.ray
@pytest.mark.slow
def test_a_scheduler_frees_what_it_stops(ray_cluster, run_sweep, tmp_path, capsys):
    """By a metric whose value is known: the momentum, that starts lower in the second trial. It is noted at once, so that
    a driver killed later does not forget it."""
    directory = SweepDirectory(tmp_path / "sweep")
    axes = (Axis.of("schedule.momentum_start", 0.99, 0.9, 0.995),)
    changes = {"--schedule.steps": 300, "--monitor.every-steps": 100, "--monitor.report-every-steps": 20}
    words = ["--asha", "train/momentum", "--at-once", "1"]
    assert run_sweep(directory.path, axes, words, changes) == 0
    ended = {directory.points()[path.name]["schedule.momentum_start"]: path.name for path in directory.runs()}
    assert directory.training(ended["0.99"]) == "finished"
    assert directory.training(ended["0.9"]) == "stopped"
    assert json.loads(directory.run(ended["0.9"]).summary.read_text())["steps"] < 300
    assert directory.training(ended["0.995"]) == "finished"
    noted, last = (directory.run(ended[name]).path / DONE for name in ("0.9", "0.995"))
    assert noted.stat().st_mtime < last.stat().st_mtime
    assert_nothing_is_left()
    capsys.readouterr()
    assert run_sweep(directory.path, axes, words, changes) == 0
    assert "3 of them done" in capsys.readouterr().out


@pytest.mark.ray
@pytest.mark.slow
def test_what_is_trained_whole_is_measured(ray_cluster, run_sweep, tmp_path):
    """A scheduler that looks at the last step would stop the worse trial there, where it saves nothing."""
    directory = SweepDirectory(tmp_path / "sweep")
    axes = (Axis.of("schedule.momentum_start", 0.99, 0.9),)
    changes = {"--schedule.steps": 40, "--monitor.every-steps": 20, "--monitor.report-every-steps": 20}
    assert run_sweep(directory.path, axes, ["--asha", "train/momentum", "--at-once", "1"], changes) == 0
    assert [directory.training(path.name) for path in directory.runs()] == ["finished", "finished"]
    assert len(list((directory.path / "trials").glob(f"*/{DONE}"))) == 2


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_may_be_a_torch_trainer(ray_cluster, clean_run, run_sweep, tmp_path):
    """With workers and data tasks of its own; the bits are those of the local engine."""
    directory = SweepDirectory(tmp_path / "sweep")
    assert run_sweep(directory.path, (Axis.of("seed", 0),), (), {"--runtime.engine": "ray"}) == 0
    (run,) = directory.runs()
    ours, clean = (checkpoint.newest_valid(path / "checkpoints") for path in (run, clean_run))
    assert (ours.path / "model.safetensors").read_bytes() == (clean.path / "model.safetensors").read_bytes()
    assert_nothing_is_left()


DOCUMENT = """
from iwm_ray import sweep
from iwm_ray.cli import parse_pretrain
from iwm_ray.sweep import main
from iwm_ray.sweeping.space import QUICK, Axis, Sweep

CONFIG = parse_pretrain({command!r})[0].config


def define(size):
    measure = QUICK.model_copy(update={measured!r})
    return Sweep("test", "Does it work?", CONFIG, (Axis.of("seed", 0),), measure)


if __name__ == "__main__":
    main(define)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_driver_loses_nothing(clean_run, tiny_command, tmp_path):
    """`kill -9` in mid-training; the same command goes on, and ends with the bits of an undisturbed run."""
    directory = SweepDirectory(tmp_path / "sweep")
    document = tmp_path / "document.py"
    command = tiny_command(tmp_path / "unused", {"--runtime.engine": "local"})
    document.write_text(DOCUMENT.format(command=command, measured=MEASURED))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    words = [sys.executable, str(document), "--output", str(directory.path)]

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            words,
            env=environment | {"PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    process = start()
    until = time.monotonic() + PATIENCE
    while not any(
        row["step"] >= 8 for path in directory.runs() for row in metrics_log.read(path / "metrics.jsonl")
    ):
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            pytest.fail(process.communicate()[0])
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=PATIENCE)

    process = start()
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    (run,) = directory.runs()
    assert attempts(directory, run.name) == 2
    assert directory.seconds(run.name) == {}
    ours, clean = (checkpoint.newest_valid(path / "checkpoints") for path in (run, clean_run))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (ours.path / name).read_bytes() == (clean.path / name).read_bytes()


@pytest.mark.ray
@pytest.mark.slow
def test_ctrl_c_in_a_finetuning_stops_after_the_step_at_hand(ray_cluster, run_sweep, tmp_path, capsys):
    """Of two trials, one at once: the first is saved in its first arm, the second never begins."""
    directory = SweepDirectory(tmp_path / "sweep")
    axes = (Axis.of("predictor.conditioning", "none", "feature"),)
    tuned = FinetuneConfig(steps=100_000, seeds=(0, 1))
    data = {"--data.path": "photos_tiny", "--data.test-path": "photos_tiny:test", "--schedule.steps": 4}

    def interrupt():
        until = time.monotonic() + PATIENCE
        arms = "trials/*/finetune/*/arms/*/metrics.jsonl"
        while not any(path.stat().st_size for path in directory.path.glob(arms)) and time.monotonic() < until:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert run_sweep(directory.path, axes, ["--at-once", "1"], data, tuned) == 130
    thread.join()
    said = capsys.readouterr()
    assert "saved; the same command goes on from there" in said.out and directory.failures() == {}
    (run,) = directory.runs()
    assert len(list(run.glob("finetune/*/arms/*/checkpoints/step_*"))) == 1
    assert not list(run.glob("finetune/*/arms/*.json"))
    assert_nothing_is_left()
