"""Whole runs on Ray, and what no fault may change about them: the same bits as an undisturbed run of the local engine."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from iwm_ray import action_log
from iwm_ray.pretrain import main
from iwm_ray.training import checkpoint, metrics_log

pytestmark = [pytest.mark.ray, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 300  # seconds; guards against hanging, measures nothing
TIMED = {"train/samples_per_second", "train/data_wait_fraction", "monitor/seconds"}


def run_here(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


def metrics(run: Path) -> list[tuple[int, str, float]]:
    """(step, name, value), as often as it stands there; of what a clock measures, no value."""
    rows = metrics_log.read(run / "metrics.jsonl")
    return sorted(
        (row["step"], name, 0.0 if name in TIMED else value)
        for row in rows
        for name, value in row.items()
        if name not in ("step", "time")
    )


def checkpoint_file(run: Path, name: str = "model.safetensors") -> Path:
    found = checkpoint.newest_valid(run / "checkpoints")
    assert found.step == 45
    return found.path / name


def assert_same_run(run: Path, clean: Path) -> None:
    """Weights, moments and metrics bit for bit; each row of the action log once."""
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert checkpoint_file(run, name).read_bytes() == checkpoint_file(clean, name).read_bytes()
    assert metrics(run) == metrics(clean)
    one, other = (action_log.read(folder / "actions") for folder in (run, clean))
    assert one.drop_columns("run").equals(other.drop_columns("run"))
    files = list((run / "actions").glob("epoch=*/*.parquet"))
    assert sum(pq.read_metadata(file).num_rows for file in files) == 45 * 32


# Without faults, on the cluster of the test session


def test_ray_computes_what_the_local_engine_computes(
    ray_cluster, clean_run, tiny_command, tmp_path, monkeypatch, capsys
):
    """From another folder, with relative names; and a run whose closing measurement was lost only measures."""
    monkeypatch.chdir(tmp_path)
    cache = Path(os.path.relpath(Path(tiny_command("")[tiny_command("").index("--runtime.cache") + 1])))
    command = tiny_command("here", {"--runtime.cache": cache})
    assert run_here(command) == 0
    assert_same_run(tmp_path / "here", clean_run)
    assert not (tmp_path / "here/ray").exists()
    assert capsys.readouterr().out.count("finished at step 45 of 45") == 1

    (tmp_path / "here/summary.json").unlink()
    assert run_here(command) == 0
    assert_same_run(tmp_path / "here", clean_run)


def test_two_workers_see_the_same_samples(ray_cluster, clean_run, tiny_command, tmp_path):
    assert run_here(tiny_command(tmp_path / "run", {"--runtime.num-workers": 2})) == 0
    one, other = (action_log.read(folder / "actions") for folder in (tmp_path / "run", clean_run))
    assert one.drop_columns("run").equals(other.drop_columns("run"))
    ours, theirs = (load_file(checkpoint_file(run)) for run in (tmp_path / "run", clean_run))
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-5
    for row, twin in zip(metrics(tmp_path / "run"), metrics(clean_run), strict=True):
        assert row[:2] == twin[:2]
        assert row[2] == pytest.approx(twin[2], rel=1e-3, abs=1e-4)


# Faults, on the cluster that the command starts for itself


def start(arguments: list[str]) -> subprocess.Popen:
    """The command in a process group of its own, as a terminal starts it, with a cluster of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "iwm_ray.pretrain", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=environment | {"PYTHONPATH": str(REPOSITORY)},
    )


def wait_until(process: subprocess.Popen, condition: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            pytest.fail(f"ended too soon: {process.communicate()[0]}")
        time.sleep(0.01)


def reported(run: Path, step: int) -> Callable[[], bool]:
    return lambda: any(row["step"] >= step for row in metrics_log.read(run / "metrics.jsonl"))


def train_worker(driver: subprocess.Popen) -> psutil.Process:
    """The train worker among the processes of the driver's cluster."""
    family = psutil.Process(driver.pid).children(recursive=True)
    (worker,) = [child for child in family if "RayTrainWorker" in " ".join(child.cmdline())]
    return worker


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_no_fault_changes_the_run(clean_run, tiny_command, tmp_path):
    """Four starts of one command: SIGTERM; Ctrl-C; kill -9 of the driver, and a bit of the newest checkpoint flips;
    kill -9 of the train worker, which Ray replaces."""
    run = tmp_path / "run"
    command = tiny_command(run)

    process = start(command)
    wait_until(process, reported(run, 4))
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143, said
    step = json.loads((run / "summary.json").read_text())["steps"]
    assert said.splitlines()[-1] == f"saved at step {step}; the same command resumes the run"
    assert not (run / "ray").exists()

    process = start(command)
    wait_until(process, reported(run, step + 4))
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all processes of the command
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, said
    step = json.loads((run / "summary.json").read_text())["steps"]
    assert (run / f"checkpoints/step_{step:08d}").is_dir()

    process = start(command)
    wait_until(process, reported(run, step + 5))
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate(timeout=PATIENCE)
    _, orphans = psutil.wait_procs(family, timeout=PATIENCE)
    assert not orphans
    newest = checkpoint.newest_valid(run / "checkpoints")
    assert newest.step < 45
    flip_a_bit(newest.path / "model.safetensors")
    older = checkpoint.newest_valid(run / "checkpoints")
    assert older.step < newest.step

    process = start(command)
    wait_until(process, reported(run, newest.step + 4))
    worker = train_worker(process)
    worker.kill()
    assert not reported(run, 45)()
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    assert f"warning: checkpoint passed over: {newest.path.name}: model.safetensors has changed" in said
    assert_same_run(run, clean_run)
    assert len((run / "attempts.jsonl").read_text().splitlines()) == 4
    assert not (run / "ray").exists()
    assert {path.name for path in run.iterdir() if path.name.startswith(".")} == {".lock"}
