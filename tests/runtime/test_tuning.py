"""Finetuning and segmentation on Ray: the same results as without it, whoever dies, however many workers there are."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from iwm_ray.config import Config, RuntimeConfig
from iwm_ray.errors import UsageError
from iwm_ray.finetune import main as finetune_main
from iwm_ray.runtime import tune
from iwm_ray.segment import main as segment_main
from iwm_ray.training import metrics_log

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PATIENCE = 300  # seconds; guards against hanging, measures nothing
DATA = ["--data.path", "photos_tiny", "--data.test-path", "photos_tiny:test"]
DATA += ["--data.num-train", "48", "--data.num-test", "30"]
SMALL = ["--steps", "6", "--batch-size", "16", "--seeds", "0", "--runtime.threads-per-worker", "1"]
STRONG = ["--tune", "both", "--drop-path", "0.3", "--augment.crop-area", "0.5"]
STRONG += ["--augment.mixup", "0.8", "--augment.cutmix", "1"]
TIMED = {"images_per_second", "peak_memory"}


def run(main, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def results(folder):
    found = {}
    for path in sorted((folder / "arms").glob("*.json")):
        result = json.loads(path.read_text())["result"]
        found[path.stem] = {name: value for name, value in result.items() if name not in TIMED}
    return found


def adapter(folder):
    (path,) = (folder / "adapters").glob("*/adapter.safetensors")
    return path


def losses(folder):
    return {
        path.parent.name: [
            (row["step"], row["train/loss"]) for row in metrics_log.read(path) if "train/loss" in row
        ]
        for path in sorted((folder / "arms").glob("*/metrics.jsonl"))
    }


@pytest.fixture(autouse=True)
def _attentive_controller(monkeypatch):
    """As `cluster.connect` sets it for a cluster that it starts."""
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")


def test_one_worker_on_ray_gives_the_bits_of_none(ray_cluster, clean_run, tmp_path):
    """From images that Ray Data augments."""
    here, there = tmp_path / "here", tmp_path / "there"
    command = [clean_run, *DATA, *SMALL, *STRONG]
    assert run(finetune_main, *command, "--output", here) == 0
    assert run(finetune_main, *command, "--output", there, "--runtime.engine", "ray") == 0
    assert results(there) == results(here) and losses(there) == losses(here)
    assert adapter(there).read_bytes() == adapter(here).read_bytes()
    assert not list(there.glob("arms/*/checkpoints")) and not list(there.glob("arms/*/ray"))


@pytest.mark.parametrize("kind", ["images", "tokens"])
def test_two_workers_differ_by_rounding_alone(ray_cluster, clean_run, tmp_path, kind):
    """Images are mixed with their neighbours in the batch, which another worker may have; of two tasks one head is
    idle at each step."""
    two = ["--data.path", "a=photos_tiny", "b=photos_tiny", "--data.test-path", "a=photos_tiny:test"]
    two += ["b=photos_tiny:test", "--single-tasks", "false", *DATA[4:]]
    command = [clean_run, *(DATA if kind == "images" else two), *SMALL, *(STRONG if kind == "images" else ())]
    here, there = tmp_path / "here", tmp_path / "there"
    assert run(finetune_main, *command, "--output", here) == 0
    workers = ["--runtime.engine", "ray", "--runtime.num-workers", 2]
    cache = ["--runtime.cache", tmp_path / "cache"] if kind == "tokens" else []  # tokens made by Ray Data
    assert run(finetune_main, *command, *workers, *cache, "--output", there) == 0
    ours, theirs = load_file(adapter(there)), load_file(adapter(here))
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-4
    for (name, one), other in zip(results(there).items(), results(here).values(), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4), name
        assert one["head_hash"] == other["head_hash"] and one["steps"] == other["steps"]


def test_a_killed_command_goes_on_where_it_was(ray_cluster, clean_run, tmp_path):
    """kill -9 of the driver, in the middle of an arm, with a cluster of its own; then to the end on ours."""
    clean, hurt = tmp_path / "clean", tmp_path / "hurt"
    many = "--steps 60 --batch-size 16 --seeds 0 --runtime.threads-per-worker 1 --runtime.checkpoint-every-steps 5"
    command = [str(word) for word in (clean_run, *DATA, *many.split(), *STRONG)]
    assert run(finetune_main, *command, "--output", clean) == 0

    repository = Path(__file__).parents[2]
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    words = [*command, "--runtime.engine", "ray", "--output", str(hurt)]
    process = subprocess.Popen(
        [sys.executable, "-m", "iwm_ray.finetune", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=own | {"PYTHONPATH": str(repository)},
    )
    until = time.monotonic() + PATIENCE
    while not any(rows and rows[-1][0] >= 10 for rows in losses(hurt).values()):
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            pytest.fail(f"ended too soon: {process.communicate()[0]}")
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    family = [child for child in family if "Agent" not in " ".join(child.cmdline())]
    process.kill()
    process.communicate(timeout=PATIENCE)
    _, orphans = psutil.wait_procs(family, timeout=PATIENCE)
    assert not orphans
    assert list(hurt.glob("arms/*/checkpoints/step_*")) and not results(hurt)

    assert run(finetune_main, *command, "--runtime.engine", "ray", "--output", hurt) == 0
    assert results(hurt) == results(clean) and losses(hurt) == losses(clean)
    assert adapter(hurt).read_bytes() == adapter(clean).read_bytes()


def test_more_than_there_is_is_refused(ray_cluster, clean_run, tmp_path, capsys):
    workers = ["--runtime.engine", "ray", "--runtime.num-workers", 8, "--output", tmp_path / "out"]
    assert run(finetune_main, clean_run, *DATA, *SMALL, *workers) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "8 x 1 CPU" in error and "the cluster has 4" in error
    workers[3] = 2
    assert run(finetune_main, clean_run, *DATA, *SMALL, *workers, "--dry-run") == 0
    assert "resources  2 x 1 CPU + 1 for data need 3 CPUs; the cluster has 4" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_rates_as_trials(ray_cluster, clean_run, tmp_path, capsys):
    """The same arms as in turns, with the same results, whichever ends first; one of the rates diverges."""
    grid = ["--lr-grid", "1e-4", "1e-2", "1e30", "--runtime.threads-per-worker", 1]
    turns, trials = tmp_path / "turns", tmp_path / "trials"
    assert run(finetune_main, clean_run, *DATA, *SMALL, *grid, "--output", turns) == 0
    capsys.readouterr()
    trial = ["--output", trials, "--runtime.arms", "tune"]
    assert run(finetune_main, clean_run, *DATA, *SMALL, *grid, *trial) == 0
    said = capsys.readouterr().out
    assert results(trials) == results(turns) and len(results(trials)) == 6
    assert said.count("lr1e+30-seed0-choice · diverged") == 2
    assert "6/6 predictor-" in said and "2/2 predictor-" in said and ": done" in said
    (one, two) = (json.loads((each / "summary.json").read_text()) for each in (turns, trials))
    assert one["metrics"] == two["metrics"]
    assert adapter(trials).read_bytes() == adapter(turns).read_bytes()


def test_what_no_repetition_can_mend_is_tried_once(ray_cluster, tmp_path, capfd):
    """A mistake of the user ends its trial with its message; a process that dies is tried again."""
    room = tune.make_room(Config(recipe="photos_tiny", runtime=RuntimeConfig(engine="local")), 1.0, 2)
    notes = tmp_path / "notes"

    def mistake():
        with notes.open("a") as file:
            file.write("mistake\n")
        raise UsageError("--lr 7: too much")

    def weak():
        with notes.open("a") as file:
            file.write("weak\n")
        if notes.read_text().count("weak") == 1:
            raise RuntimeError("again")

    with pytest.raises(UsageError, match="^--lr 7: too much$"):
        tune.run_beside([mistake, weak], ["a", "b"], room, max_failures=2)
    assert sorted(notes.read_text().split()) == ["mistake", "weak", "weak"]
    said = capfd.readouterr().out
    assert "a: failed" in said and "b: done" in said


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Bright discs on dark ground; options that name them."""
    root, words = tmp_path_factory.mktemp("shapes"), []
    generator = np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 8)):
        for number in range(count):
            image, mask = Image.new("RGB", (40, 32), (20, 20, 60)), Image.new("L", (40, 32), 0)
            left, top = (int(place) for place in generator.integers(0, [24, 16]))
            for picture, fill in ((image, (240, 220, 60)), (mask, 1)):
                ImageDraw.Draw(picture).ellipse((left, top, left + 15, top + 15), fill=fill)
            for kind, picture in (("images", image), ("masks", mask)):
                folder = root / kind / part
                folder.mkdir(parents=True, exist_ok=True)
                picture.save(folder / f"{number:02}.png")
    for option, folder in (
        ("path", "images/train"), ("masks", "masks/train"), ("test-path", "images/val"), ("test-masks", "masks/val"),
    ):  # fmt: skip
        words += [f"--data.{option}", str(root / folder)]
    return words


def test_a_segmentation_on_two_workers(ray_cluster, clean_run, shapes, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    command = [clean_run, *shapes, "--steps", 6, "--batch-size", 8, "--seeds", 0, "--tune", "both"]
    assert run(segment_main, *command, "--runtime.threads-per-worker", 1, "--output", here) == 0
    workers = ["--runtime.engine", "ray", "--runtime.num-workers", 2, "--output", there]
    assert run(segment_main, *command, "--runtime.threads-per-worker", 1, *workers) == 0
    (one,), (two,) = (list(each.glob("adapters/*/segmenter.safetensors")) for each in (here, there))
    ours, theirs = load_file(two), load_file(one)
    # AdamW makes whole steps of rounding where the true gradient is 0: before the heads' batch normalisation.
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 6e-3
    facts = [
        [json.loads(path.read_text()) for path in sorted(each.glob("arms/*.json"))] for each in (here, there)
    ]
    for one, two in zip(*facts, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
    metrics = [json.loads((each / "summary.json").read_text())["metrics"] for each in (here, there)]
    assert metrics[0] == pytest.approx(metrics[1], abs=0.02)
