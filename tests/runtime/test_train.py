"""Whole runs on Ray, and what no fault may change about them: the same bits as an undisturbed run of the local engine."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
import psutil
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.torch import load_file

from iwm_ray import action_log
from iwm_ray.pretrain import main
from iwm_ray.training import checkpoint, metrics_log

pytestmark = [pytest.mark.ray, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
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


@pytest.fixture(autouse=True)
def _attentive_controller(monkeypatch):
    """As `cluster.connect` sets it for a cluster that it starts."""
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name, as sockets need it, for all files of a cluster."""
    made = Path(tempfile.mkdtemp(prefix="iwm-test-"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


def environment(**more: str) -> dict[str, str]:
    """Ours, without the cluster of the test session."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return own | {"PYTHONPATH": str(REPOSITORY)} | more


def start(arguments: list[str], folder: Path) -> subprocess.Popen:
    """The command in a process group of its own, as a terminal starts it; it starts a cluster for itself."""
    return subprocess.Popen(
        [sys.executable, "-m", "iwm_ray.pretrain", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=environment(TMPDIR=str(folder)),
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


@contextmanager
def when(condition: Callable[[], bool], act: Callable[[], None]) -> Iterator[None]:
    """Acts once, beside what goes on in the block, as soon as the condition holds."""
    over, acted = threading.Event(), []

    def watch() -> None:
        while not over.wait(0.01):
            if condition():
                act()
                acted.append(True)
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert acted


def kill_train_worker() -> None:
    """`kill -9` of the train worker among the processes of our cluster."""
    (worker,) = [
        process
        for process in psutil.Process().children(recursive=True)
        if "RayTrainWorker" in " ".join(process.cmdline())
    ]
    worker.kill()


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_signals_and_a_lost_worker_change_nothing(ray_cluster, clean_run, tiny_command, tmp_path, capsys):
    """Three starts of one command: SIGTERM; kill -9 of the train worker, which Ray replaces; and, after the closing
    measurement was lost, only that once more."""
    run = tmp_path / "run"
    command = tiny_command(run)

    with when(reported(run, 4), lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert run_here(command) == 143
    said = capsys.readouterr().out
    step = json.loads((run / "summary.json").read_text())["steps"]
    assert 4 <= step < 45
    assert said.splitlines()[-1] == f"saved at step {step}; the same command resumes the run"

    with when(reported(run, step + 6), kill_train_worker):
        assert run_here(command) == 0
    assert_same_run(run, clean_run)
    assert len(list((run / "checkpoints").glob(".generation-*"))) == 3  # or the worker was killed too late
    assert not (run / "ray").exists()

    (run / "summary.json").unlink()
    (run / "pictures/retrieval.png").unlink()
    assert run_here(command) == 0
    assert_same_run(run, clean_run)
    assert (run / "pictures/retrieval.png").exists()


def test_two_workers_see_the_same_samples(
    ray_cluster, clean_run, tiny_command, photo_cache, tmp_path, monkeypatch
):
    """With names relative to a folder that is not the workers'."""
    monkeypatch.chdir(tmp_path)
    changes = {"--runtime.num-workers": 2, "--runtime.cache": os.path.relpath(photo_cache)}
    assert run_here(tiny_command("run", changes)) == 0
    run = tmp_path / "run"
    one, other = (action_log.read(folder / "actions") for folder in (run, clean_run))
    assert one.drop_columns(["run", "loss"]).equals(other.drop_columns(["run", "loss"]))
    np.testing.assert_allclose(one["loss"].to_numpy(), other["loss"].to_numpy(), rtol=1e-3)
    ours, theirs = (load_file(checkpoint_file(folder)) for folder in (run, clean_run))
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-5
    for row, twin in zip(metrics(run), metrics(clean_run), strict=True):
        assert row[:2] == twin[:2]
        assert row[2] == pytest.approx(twin[2], rel=1e-3, abs=1e-4)


def test_a_killed_driver_loses_nothing(ray_cluster, clean_run, tiny_command, folder, tmp_path, capfd):
    """Three starts of one command: Ctrl-C; kill -9 of the driver, whereupon a bit of the newest checkpoint flips; and
    to the end. The first two have clusters of their own, as without RAY_ADDRESS."""
    run = tmp_path / "run"
    command = tiny_command(run)

    process = start(command, folder)
    wait_until(process, reported(run, 4))
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all processes of the command
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, said
    step = json.loads((run / "summary.json").read_text())["steps"]
    assert said.splitlines()[-1] == f"saved at step {step}; the same command resumes the run"
    assert not list(folder.iterdir())

    process = start(command, folder)
    wait_until(process, reported(run, step + 5))
    family = psutil.Process(process.pid).children(recursive=True)
    # Two idle servers of Ray's stay for a minute.
    family = [child for child in family if "Agent" not in " ".join(child.cmdline())]
    process.kill()
    process.communicate(timeout=PATIENCE)
    _, orphans = psutil.wait_procs(family, timeout=PATIENCE)
    assert not orphans
    newest = checkpoint.newest_valid(run / "checkpoints")
    assert newest.step < 45
    flip_a_bit(newest.path / "model.safetensors")
    assert checkpoint.newest_valid(run / "checkpoints").step < newest.step

    assert run_here(command) == 0
    assert (
        f"warning: checkpoint passed over: {newest.path.name}: model.safetensors has"
        in capfd.readouterr().out
    )
    assert_same_run(run, clean_run)
    assert {path.name for path in run.iterdir() if path.name.startswith(".")} == {".lock"}


def test_a_sample_that_kills_its_decoder_is_set_aside_and_the_run_goes_on(tiny_command, folder, tmp_path):
    """One photograph of 64 has a word in it at which the decoder of data tasks kills its process."""
    code = """
        import os, signal, sys
        import simplejpeg
        decode = simplejpeg.decode_jpeg
        def ill(data, *words, **more):
            frame, names = sys._getframe(), set()
            while frame := frame.f_back:
                names.add(frame.f_code.co_name)
            if b"deadly" in bytes(data) and names & {"rows", "_taste"}:
                os.kill(os.getpid(), signal.SIGKILL)
            return decode(data, *words, **more)
        simplejpeg.decode_jpeg = ill
    """
    (tmp_path / "ill").mkdir()
    (tmp_path / "ill/sitecustomize.py").write_text(textwrap.dedent(code))
    for i in range(64):
        file = tmp_path / f"data/{i % 2}/{i:02d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(pixels).resize((48, 48)).save(file)
    file.write_bytes(file.read_bytes() + b"deadly")
    options = {"--data.path": tmp_path / "data", "--schedule.steps": 4, "--data.max-bad-fraction": 0.1}
    ended = subprocess.run(
        [sys.executable, "-m", "iwm_ray.pretrain", *tiny_command(tmp_path / "run", options)],
        env=environment(TMPDIR=str(folder), PYTHONPATH=f"{tmp_path / 'ill'}{os.pathsep}{REPOSITORY}"),
        capture_output=True,
        text=True,
        timeout=PATIENCE * 2,
    )
    assert ended.returncode == 0, ended.stderr
    (record,) = [json.loads(line) for line in (tmp_path / "run/quarantine.jsonl").read_text().splitlines()]
    assert record["row_id"] == "1/63.jpg"
    assert record["reason"] == "ends the process that decodes it (SIGKILL)"
    logged = action_log.read(tmp_path / "run/actions")
    assert logged.num_rows == 4 * 32
    assert set(logged.filter(pc.field("error") != "")["row_id"].to_pylist()) == {"1/63.jpg"}


# Submitted to a cluster


@dataclass(frozen=True)
class Head:
    """A Ray head that was started for a test."""

    address: str
    environment: dict[str, str]
    folder: Path


@pytest.fixture
def head(folder) -> Iterator[Head]:
    """`ray start --head` with a token, its dashboard on loopback."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
    gcs, dashboard, agent, client = (free.getsockname()[1] for free in sockets)
    for free in sockets:
        free.close()
    token = uuid.uuid4().hex
    own = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token, RAY_USAGE_STATS_ENABLED="0")
    options = (
        f"--head --block --port={gcs} --dashboard-port={dashboard} --dashboard-agent-listen-port={agent} "
    )
    options += (
        f"--ray-client-server-port={client} --dashboard-host=127.0.0.1 --num-cpus=4 --temp-dir={folder}"
    )
    process = subprocess.Popen([*RAY, "start", *options.split()], env=own, stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_until(process, lambda: _answers(f"{address}/api/version", token))
        yield Head(address, own, folder)
    finally:
        family = [process, *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            with suppress(psutil.NoSuchProcess):  # its parent's end may have been its own
                member.kill()
        process.wait()


def _answers(address: str, token: str) -> bool:
    try:
        with urlopen(Request(address, headers={"Authorization": f"Bearer {token}"}), timeout=5):
            return True
    except (URLError, OSError):
        return False


def test_a_submitted_job_succeeds(head, tiny_command, tmp_path):
    folder = tmp_path / "working"
    shutil.copytree(REPOSITORY / "iwm_ray", folder / "iwm_ray", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / ".gitignore", folder)
    for ignored in ("runs/before/weights.safetensors", "mlflow.db", ".venv/lib.so"):
        (folder / ignored).parent.mkdir(parents=True, exist_ok=True)
        (folder / ignored).write_bytes(bytes(1000))
    run = tmp_path / "run"
    command = tiny_command(run, {"--schedule.steps": 3, "--runtime.checkpoint-every-steps": 3})
    job = [
        "job",
        "submit",
        "--address",
        head.address,
        "--submission-id",
        "pretraining",
        "--working-dir",
        folder,
    ]
    done = subprocess.run(
        [*RAY, *job, "--", sys.executable, "-m", "iwm_ray.pretrain", *command],
        env={name: value for name, value in head.environment.items() if name != "PYTHONPATH"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout
    assert "Job 'pretraining' succeeded" in done.stdout
    assert "finished at step 3 of 3" in done.stdout
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"
    found = head.folder.glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*")
    (uploaded,) = (path for path in found if path.is_dir())
    assert (uploaded / "iwm_ray/pretrain.py").exists()
    assert {path.name for path in uploaded.iterdir()} <= {"iwm_ray", ".gitignore"}
