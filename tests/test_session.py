"""One worker's part, with rows made in this process: faults at any step, in seconds."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

from iwm_ray import action_log
from iwm_ray.build import build
from iwm_ray.cli import parse_pretrain
from iwm_ray.errors import SupersededError
from iwm_ray.loader import to_tensors
from iwm_ray.run_directory import RunDirectory
from iwm_ray.session import Reporter, work
from iwm_ray.training import checkpoint, metrics_log
from iwm_ray.workers import Worker, resume_step

WORKER = Worker(0, 1, torch.device("cpu"))
SHORT = {"--schedule.steps": 7, "--monitor.every-steps": 3, "--runtime.checkpoint-every-steps": 2}


@pytest.fixture
def prepare(tiny_command):
    """`prepare(folder, {"--option": value})`: the setup of a short run whose directory exists."""

    def make(folder, changes=None):
        command, _ = parse_pretrain(tiny_command(folder, SHORT | (changes or {})))
        run = RunDirectory(folder)
        setup = build(command.config, run)
        with run.lock():
            run.create(command.config, setup.feed.index.hash)
        return setup

    return make


def columns_of(setup, spoil=lambda step, rows: rows):
    def open_columns(step):
        size = setup.config.optimizer.global_batch_size
        for at in range(step, setup.total_steps):
            rows = setup.feed.rows(np.arange(at * size, (at + 1) * size))
            yield to_tensors(spoil(at, rows))

    return open_columns


def train(setup, worker=WORKER, **options):
    return work(setup, worker, columns_of(setup, **options))


def weights(setup):
    found = checkpoint.newest_valid(setup.run.checkpoints)
    assert found.step == setup.total_steps
    return load_file(found.path / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def metric_counts(setup):
    rows = metrics_log.read(setup.run.metrics)
    return Counter((row["step"], name) for row in rows for name in row if name not in ("step", "time"))


@pytest.fixture(scope="module")
def undisturbed(tiny_command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    command, _ = parse_pretrain(tiny_command(folder, SHORT))
    setup = build(command.config, RunDirectory(folder))
    with setup.run.lock():
        setup.run.create(command.config, setup.feed.index.hash)
    assert train(setup).status == "finished"
    return setup


@pytest.fixture(autouse=True)
def _no_pictures(undisturbed, monkeypatch):
    """They take longer than all the rest; `undisturbed` has drawn them."""
    monkeypatch.setattr("iwm_ray.pictures.retrieval.retrieval_gallery", lambda *arguments: Figure())
    monkeypatch.setattr("iwm_ray.pictures.curves.training_curves", lambda *arguments: Figure())


class Killed(BaseException):
    pass


def test_a_run_reports_at_its_rates(undisturbed):
    counts = metric_counts(undisturbed)
    assert set(counts.values()) == {1}
    assert {step for step, name in counts if name == "train/loss"} == set(range(1, 8))
    assert {step for step, name in counts if name == "monitor/rankme"} == {0, 3, 6, 7}
    assert {step for step, name in counts if name == "mrr/mrr"} == {7}
    assert (undisturbed.run.pictures / "retrieval.png").stat().st_size > 10_000
    assert (undisturbed.run.pictures / "curves.png").exists()
    logged = action_log.read(undisturbed.run.actions)
    assert logged["counter"].to_pylist() == list(range(7 * 32))
    mean_losses = logged["loss"].to_numpy().reshape(7, 32).mean(1)
    reported = {
        row["step"]: row["train/loss"]
        for row in metrics_log.read(undisturbed.run.metrics)
        if "train/loss" in row
    }
    np.testing.assert_allclose(mean_losses, [reported[step] for step in range(1, 8)], rtol=1e-5)


@pytest.mark.parametrize("step", [0, 1, 4, 6, 7])
def test_a_worker_that_dies_at_any_step_loses_nothing(prepare, tmp_path, undisturbed, step, monkeypatch):
    """0: before the first step; 7: after the last checkpoint, before the closing measurement."""
    setup = prepare(tmp_path / "run")

    def die(at, rows):
        if at == step:
            raise Killed
        return rows

    with monkeypatch.context() as patch:
        if step == 7:
            patch.setattr("iwm_ray.session.measure", lambda *arguments: die(7, None))
        with pytest.raises(Killed):
            train(setup, spoil=die)
    assert resume_step(setup.run.checkpoints) == (7 if step == 7 else step // 2 * 2)
    assert train(setup).status == "finished"
    assert same(weights(setup), weights(undisturbed))
    assert metric_counts(setup) == metric_counts(undisturbed)


def test_a_request_saves_at_that_step_and_stops(prepare, tmp_path, undisturbed):
    setup = prepare(tmp_path / "run")

    def ask(at, rows):
        if at == 2:
            setup.run.stop_request.touch()
        return rows

    outcome = train(setup, spoil=ask)
    assert (outcome.status, outcome.step) == ("stopped", 3)
    assert resume_step(setup.run.checkpoints) == 3
    setup.run.stop_request.unlink()
    assert train(setup).status == "finished"
    assert same(weights(setup), weights(undisturbed))
    assert metric_counts(setup) == metric_counts(undisturbed)


def test_a_damaged_checkpoint_is_passed_over_and_told(prepare, tmp_path, undisturbed):
    setup = prepare(tmp_path / "run")

    def die(at, rows):
        if at == 5:
            raise Killed
        return rows

    with pytest.raises(Killed):
        train(setup, spoil=die)
    newest = checkpoint.newest_valid(setup.run.checkpoints).path / "optimizer.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert resume_step(setup.run.checkpoints) == 2
    assert train(setup).status == "finished"
    assert same(weights(setup), weights(undisturbed))
    assert metric_counts(setup) == metric_counts(undisturbed)
    assert "step_00000004: optimizer.safetensors has changed" in setup.run.warnings.read_text()


def test_without_an_intact_checkpoint_the_run_does_not_begin_anew(prepare, tmp_path):
    setup = prepare(tmp_path / "run")
    assert train(setup).status == "finished"
    for manifest in setup.run.checkpoints.glob("step_*/MANIFEST.json"):
        manifest.write_text("{}")
    outcome = train(setup)
    assert outcome.status == "failed"
    assert "no intact checkpoint" in outcome.message


def test_what_no_restart_can_mend_is_an_outcome_for_one_worker(prepare, tmp_path):
    setup = prepare(tmp_path / "run", {"--optimizer.lr": 1e30, "--schedule.steps": 40})
    outcome = train(setup)
    assert outcome.status == "failed"
    assert "lower optimizer.lr" in outcome.message


def test_what_no_restart_can_mend_is_noted_where_workers_wait_for_each_other(prepare, tmp_path):
    setup = prepare(tmp_path / "run")
    longer = replace(setup, total_steps=8)  # as if the data had grown
    assert train(setup).status == "finished"
    refused = train(longer)
    assert refused.status == "failed"
    assert "is of a run of 7 steps" in refused.message
    assert not setup.run.failure.exists()
    two = Worker(0, 2, torch.device("cpu"))
    with pytest.raises(Exception, match="is of a run of 7 steps"):
        train(longer, worker=two)
    assert train(longer, worker=two) == refused  # the restarted group reads the note


def test_a_worker_that_was_replaced_writes_nothing_more(prepare, tmp_path):
    setup = prepare(tmp_path / "run")

    def replace_me(at, rows):
        if at == 3:
            checkpoint.next_generation(setup.run.checkpoints)
        return rows

    with pytest.raises(SupersededError):
        train(setup, spoil=replace_me)
    assert max(row["step"] for row in metrics_log.read(setup.run.metrics)) == 3
    assert resume_step(setup.run.checkpoints) == 2
    assert not setup.run.failure.exists()  # it is not the run that has failed


def test_rows_of_another_step_are_refused(prepare, tmp_path):
    setup = prepare(tmp_path / "run")

    def shift(at, rows):
        return rows | {"counter": rows["counter"] + 32 * (at == 2)}

    with pytest.raises(RuntimeError, match=r"step 2 was handed rows of steps \[3\]"):
        train(setup, spoil=shift)


def test_a_full_disk_at_a_checkpoint_is_told_and_training_goes_on(prepare, tmp_path, monkeypatch):
    setup = prepare(tmp_path / "run")
    real = checkpoint.save

    def save(directory, state, *rest):
        saved = real(directory, state, *rest)
        return saved if state.step != 4 else checkpoint.Saved(None, "checkpoint of step 4: not written")

    monkeypatch.setattr(checkpoint, "save", save)
    assert train(setup).status == "finished"
    assert setup.run.warnings.read_text() == "checkpoint of step 4: not written\n"


def test_more_bad_samples_than_allowed_end_the_run(prepare, tmp_path):
    setup = prepare(tmp_path / "run", {"--data.max-bad-fraction": 0.0015})  # 1.8 of 1200
    lines = [{"row_id": f"a/{n}.png", "path": f"/data/a/{n}.png", "reason": "cut"} for n in range(2)]
    setup.run.quarantine.write_text(json.dumps(lines[0]) + "\n")

    def meet_another(at, rows):
        if at == 4:
            setup.run.quarantine.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return rows

    outcome = train(setup, spoil=meet_another)
    assert outcome.status == "failed"
    assert outcome.message.startswith(
        "2 of 1200 samples can't be decoded, more than data.max_bad_fraction 0.0015"
    )
    assert "/data/a/0.png, /data/a/1.png" in outcome.message
    assert max(row["step"] for row in metrics_log.read(setup.run.metrics)) == 5


def test_only_the_first_worker_writes(prepare, tmp_path):
    setup = prepare(tmp_path / "run")
    state = type("State", (), {"step": 0})()
    Reporter(setup, Worker(1, 2, torch.device("cpu")), state, generation=0)
    assert not setup.run.metrics.exists()
    assert not list(setup.run.checkpoints.iterdir())
