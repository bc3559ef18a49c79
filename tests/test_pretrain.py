"""The command, on the engine `local`; tests/runtime/test_train.py has the same on Ray."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from iwm_ray import action_log
from iwm_ray.build import Setup, build
from iwm_ray.cli import parse_pretrain
from iwm_ray.driver import Stop
from iwm_ray.pretrain import forget_mended_samples, main
from iwm_ray.run_directory import RunDirectory
from iwm_ray.training import metrics_log

REPOSITORY = Path(__file__).parents[1]
SHARED = REPOSITORY.parent / "shared"
LOCAL = {"--runtime.engine": "local"}
PATIENCE = 300  # seconds; guards against hanging, measures nothing


def run_here(arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def start(arguments) -> subprocess.Popen:
    """The command in a process group of its own, as a terminal starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "iwm_ray.pretrain", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    """Until the run has reported a step."""
    until = time.monotonic() + PATIENCE
    while not any(row["step"] >= step for row in metrics_log.read(run / "metrics.jsonl")):
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            pytest.fail(f"no step {step}: {process.communicate()[0]}")
        time.sleep(0.01)


def weights(run: Path) -> str:
    """A fingerprint of the final weights."""
    step = json.loads((run / "summary.json").read_text())["total_steps"]
    return hashlib.sha256((run / f"checkpoints/step_{step:08d}/model.safetensors").read_bytes()).hexdigest()


def metric_names(run: Path) -> list[tuple[int, str]]:
    """(step, name) of every value, as often as it stands there."""
    rows = metrics_log.read(run / "metrics.jsonl")
    return sorted((row["step"], name) for row in rows for name in row if name not in ("step", "time"))


def prepare(arguments) -> Setup:
    """A run that has been created, but not trained."""
    command, _ = parse_pretrain([str(argument) for argument in arguments])
    setup = build(command.config, RunDirectory(command.output))
    with setup.run.lock():
        setup.run.create(command.config, setup.feed.index.hash)
    return setup


def listing(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


# A run from its start to its end


def test_a_run_leaves_what_is_promised(clean_run):
    assert {path.name for path in clean_run.iterdir() if not path.name.startswith(".")} == {
        "actions",
        "attempts.jsonl",
        "checkpoints",
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "pictures",
        "summary.json",
    }
    found = json.loads((clean_run / "summary.json").read_text())
    assert (found["status"], found["steps"], found["samples"], found["quarantined"]) == (
        "finished",
        45,
        1440,
        0,
    )
    assert found["health"] in ("ok", "warn")
    assert 0 < found["goodput"] <= 1
    promised = (
        "train/loss train/lr train/weight_decay train/momentum train/grad_norm train/samples_per_second "
    )
    promised += "train/data_wait_fraction monitor/rankme monitor/lidar monitor/target_std monitor/action_gap "
    promised += "monitor/knn_top1 "
    promised += "mrr/mrr mrr/chance mrr/adjusted mrr/zero_action mrr/shuffled_action mrr/h1 mrr/h5 mrr/h10"
    assert set(promised.split()) <= found["metrics"].keys()
    assert {path.name for path in (clean_run / "pictures").iterdir()} == {
        "curves.png",
        "retrieval.png",
        "views.png",
    }
    kept = sorted(path.name for path in (clean_run / "checkpoints").glob("step_*"))
    assert kept[-2:] == ["step_00000044", "step_00000045"]
    assert {path.name for path in (clean_run / "checkpoints" / kept[-1]).iterdir()} == {
        "MANIFEST.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    }
    logged = action_log.read(clean_run / "actions")
    assert logged["counter"].to_pylist() == list(range(45 * 32))
    assert logged["epoch"].to_pylist() == [counter // (37 * 32) for counter in range(45 * 32)]


def test_the_same_seed_gives_the_same_bits_with_other_processes(clean_run, tiny_command, tmp_path):
    assert run_here(tiny_command(tmp_path / "run", LOCAL | {"--runtime.data-workers": 2})) == 0
    assert weights(tmp_path / "run") == weights(clean_run)
    assert metric_names(tmp_path / "run") == metric_names(clean_run)


def test_a_finished_run_does_no_work(clean_run, tiny_command, capsys):
    files = [clean_run / "metrics.jsonl", clean_run / "attempts.jsonl", *clean_run.rglob("*.safetensors")]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    assert run_here(tiny_command(clean_run, LOCAL)) == 0
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files} == before
    assert capsys.readouterr().out.startswith(f"finished at step 45 of 45: {clean_run}\n  MRR ")


def test_another_configuration_is_refused_there(clean_run, tiny_command, capsys):
    before = listing(clean_run)
    assert run_here(tiny_command(clean_run, LOCAL | {"--optimizer.lr": 0.5, "--seed": 1})) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "holds a run with another configuration: seed 0 != 1 (+1 more); choose another --output" in error
    assert listing(clean_run) == before


def test_a_run_goes_on_only_with_the_images_that_it_began_with(tiny_command, tmp_path, capsys):
    command = tiny_command(tmp_path / "run", FEW | {"--data.path": tmp_path / "data"})
    make_images(tmp_path / "data", 20)
    prepare(command)
    make_images(tmp_path / "data", 21)
    assert run_here(command) == 2
    assert "the images are not those that the run" in capsys.readouterr().err


# Faults and signals


def test_signals_and_kills_at_any_time_change_nothing(clean_run, tiny_command, tmp_path):
    """Three starts of one command: Ctrl-C, kill -9, and to the end."""
    run = tmp_path / "run"
    command = tiny_command(run, LOCAL)

    process = start(command)
    wait_for_step(process, run, 5)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the data processes, too
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, said
    assert "saving and stopping; once more to stop at once" in said
    stopped = json.loads((run / "summary.json").read_text())
    assert stopped["status"] == "stopped"
    assert (run / f"checkpoints/step_{stopped['steps']:08d}").is_dir()
    assert said.splitlines()[-1] == f"saved at step {stopped['steps']}; the same command resumes the run"

    process = start(command)
    wait_for_step(process, run, stopped["steps"] + 5)
    process.kill()
    process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGKILL

    process = start(command)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    assert weights(run) == weights(clean_run)
    assert metric_names(run) == metric_names(clean_run)
    one, other = (action_log.read(folder / "actions") for folder in (run, clean_run))
    assert one.equals(other)
    assert len((run / "attempts.jsonl").read_text().splitlines()) == 3
    assert not (run / "stop-request").exists()


def test_a_second_signal_ends_the_run_without_saving(clean_run, monkeypatch, capfd):
    clock = [100.0]
    monkeypatch.setattr("iwm_ray.pretrain.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("iwm_ray.pretrain.os._exit", sys.exit)
    run = RunDirectory(clean_run)
    stop = Stop(run)
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        assert run.stop_request.exists()
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher signals the process and its group
        clock[0] += 2
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGINT)
    assert ended.value.code == 130
    run.stop_request.unlink()
    said = capfd.readouterr().out.split("\n")
    assert said[1::2] == [
        "saving and stopping; once more to stop at once",
        "stopped without saving; the same command resumes from the last checkpoint",
    ]


def test_a_second_start_beside_a_live_run_is_refused(clean_run, tiny_command, capsys):
    with RunDirectory(clean_run).lock():
        assert run_here(tiny_command(clean_run, LOCAL)) == 2
    assert f"a run is live there (pid {os.getpid()} on " in capsys.readouterr().err


def test_ctrl_c_before_the_training_is_no_traceback(clean_run, tiny_command, monkeypatch, capsys):
    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("iwm_ray.pretrain.preflight", interrupt)
    assert run_here(tiny_command(clean_run, LOCAL)) == 130
    assert capsys.readouterr().err == "iwm-ray: interrupted\n"


# Bad images


def make_images(folder: Path, count: int, bad: int = 0) -> None:
    """Class folders of small images, the last `bad` of which are cut off."""
    noise = np.random.default_rng(0)
    for n in range(count):
        path = folder / ("rose" if n % 2 else "tulip") / f"{n:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)
        if n >= count - bad:
            path.write_bytes(path.read_bytes()[:100])


FEW = LOCAL | {
    "--optimizer.global-batch-size": 8,
    "--steps": 12,
    "--monitor.num-images": 8,
    "--data.test-path": "",
}


def test_bad_images_are_counted_or_end_the_run(tiny_command, tmp_path, capsys):
    make_images(tmp_path / "data", 20, bad=2)
    options = FEW | {"--data.path": tmp_path / "data", "--monitor.num-bank-images": 8}

    assert run_here(tiny_command(tmp_path / "strict", options)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "2 of 20 samples can't be decoded, more than data.max_bad_fraction 0.001" in error
    assert "rose/019.png" in error
    assert "tulip/018.png" in error
    assert json.loads((tmp_path / "strict/summary.json").read_text())["status"] == "failed"

    assert run_here(tiny_command(tmp_path / "lenient", options | {"--data.max-bad-fraction": 0.5})) == 0
    found = json.loads((tmp_path / "lenient/summary.json").read_text())
    assert (found["status"], found["quarantined"]) == ("finished", 2)
    assert "2 samples could not be read" in capsys.readouterr().out
    logged = action_log.read(tmp_path / "lenient/actions").to_pandas()
    assert set(logged[logged["error"] != ""]["row_id"]) == {"rose/019.png", "tulip/018.png"}


def test_samples_that_can_be_read_again_leave_the_quarantine(tiny_command, tmp_path):
    """Storage that was away for a while must not end a run for ever."""
    make_images(tmp_path / "data", 20, bad=1)
    setup = prepare(tiny_command(tmp_path / "run", FEW | {"--data.path": tmp_path / "data"}))
    records = [{"row_id": name, "path": "", "reason": "away"} for name in ("rose/001.png", "rose/019.png")]
    setup.run.quarantine.write_text("".join(json.dumps(record) + "\n" for record in records))
    forget_mended_samples(setup)
    assert setup.run.quarantined() == records[1:]


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data is not here")
def test_the_worst_images_that_we_know_are_quarantined(tiny_command, tmp_path):
    options = FEW | {"--data.path": SHARED / "data/corrupt/mixed_dataset", "--data.max-bad-fraction": 0.5}
    assert run_here(tiny_command(tmp_path / "run", options)) == 0
    found = json.loads((tmp_path / "run/summary.json").read_text())
    assert found["status"] == "finished"
    assert found["quarantined"] == len((tmp_path / "run/quarantine.jsonl").read_text().splitlines()) > 0


# The plan, and what is refused before anything is created


def test_a_dry_run_prints_the_plan_and_creates_nothing(tiny_command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_here([*tiny_command("run"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    for word in (
        "data",
        "steps",
        "tokens",
        "action",
        "parameters",
        "memory",
        "arithmetic",
        "time",
        "resources",
    ):
        assert f"\n  {word}" in said
    assert "1,200 images, 10 classes" in said
    assert "45 of 32 images; 37 an epoch" in said
    assert listing(tmp_path) == []


def test_a_submitted_job_is_told_where_its_files_would_vanish(tiny_command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")  # Ray sets it for submitted jobs
    assert run_here([*tiny_command("run", LOCAL), "--dry-run"]) == 0
    assert "lies in the submitted job's own folder" in capsys.readouterr().err
    assert run_here([*tiny_command(tmp_path.parent / "run", LOCAL), "--dry-run"]) == 0
    assert capsys.readouterr().err == ""


def _no_column(folder: Path) -> None:
    pq.write_table(pa.table({"picture": [b"", b""]}), folder / "a.parquet")


def _not_parquet(folder: Path) -> None:
    (folder / "a.parquet").write_bytes(b"PAR1 but no more")


def _seven_images(folder: Path) -> None:
    make_images(folder, 7)


def _nothing(folder: Path) -> None:
    pass


def _words(folder: Path) -> None:
    (folder / "thesis.tex").touch()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--predictor.dept": 3}, ["--predictor.dept", "did you mean '--predictor.depth'?"]),
        ({"--views.image-size": 30}, ["encoder.patch_size 8 does not divide views.image_size 30", "6, 10"]),
        ({"--masks.block-scale": ("0.9", "1.0")}, ["masks."]),
        (
            {"--runtime.num-workers": 3},
            ["32 is not divisible by runtime.num_workers 3", "[1, 2, 4, 8, 16, 32]"],
        ),
        ({"--runtime.num-workers": 32}, ["runtime.num_workers", "32 x 1 CPU"]),
        ({"--runtime.num-workers": 2, **LOCAL}, ["engine local has one worker"]),
        ({"--data.path": "nowhere"}, ["data.path", "nowhere"]),
        ({"--data.path": "data"}, ["data.path", "data"]),
        ({"--encoder.name": "vit_tinny_patch16_224"}, ["encoder.name", "did you mean vit_tiny_patch16_224"]),
        ({"--output": "data/file/run"}, ["--output", "not a writable folder"]),
        ({"--output": "data"}, ["--output", "not empty and not a run directory"]),
        ({"--tracking.uri": "file:mlruns"}, ["tracking.uri", "sqlite:///mlflow.db"]),
        ({"--runtime.cache": "data/file"}, ["runtime.cache"]),
    ],
    ids=lambda value: (
        " ".join(f"{name}={setting}" for name, setting in value.items()) if isinstance(value, dict) else ""
    ),
)
def test_a_mistake_is_answered_in_one_line_and_nothing_is_created(
    tiny_command, tmp_path, monkeypatch, capsys, changes, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/file").touch()
    _refuse(tiny_command("run", changes), words, tmp_path, capsys)


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (_no_column, ["data.image_column", "picture"]),
        (_not_parquet, ["data.path", "a.parquet"]),
        (_seven_images, ["optimizer.global_batch_size 32 is more than the 7 images"]),
        (_nothing, ["data.path"]),
        (_words, ["data.path"]),
    ],
)
def test_data_that_no_run_can_use_is_answered_likewise(
    tiny_command, tmp_path, monkeypatch, capsys, prepare, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    prepare(tmp_path / "data")
    _refuse(tiny_command("run", {"--data.path": "data", "--data.test-path": ""}), words, tmp_path, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("engine", ["ray", "local"])
def test_a_gpu_that_is_not_there_is_refused(tiny_command, tmp_path, capsys, engine):
    options = {"--runtime.use-gpu": True, "--runtime.engine": engine}
    _refuse(
        tiny_command(tmp_path / "run", options),
        ["runtime.use_gpu", "set runtime.use_gpu False"],
        tmp_path,
        capsys,
    )


def _refuse(arguments, words, folder, capsys):
    before = listing(folder)
    split = [part for word in arguments for part in (word if isinstance(word, tuple) else (word,))]
    assert run_here(split) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("iwm-ray: error: ")
    for word in words:
        assert word in error
    assert listing(folder) == before


def test_a_mistake_on_a_real_command_line(tmp_path):
    command = [sys.executable, "-m", "iwm_ray.pretrain", "photos_tinny", "--output", tmp_path / "run"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "did you mean 'photos_tiny'?" in done.stderr
    assert listing(tmp_path) == []
