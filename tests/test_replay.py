"""Logged samples rebuilt from a run directory; nothing needs to be trained for it."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iwm_ray import action_log
from iwm_ray.build import build
from iwm_ray.cli import parse_pretrain
from iwm_ray.replay import find_row, main, rebuild
from iwm_ray.run_directory import RunDirectory


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    """40 images in two classes."""
    folder = tmp_path_factory.mktemp("flowers")
    noise = np.random.default_rng(0)
    for n in range(40):
        coarse = noise.integers(0, 256, (6, 5, 3), dtype=np.uint8)
        path = folder / ("rose" if n % 2 else "tulip") / f"{n:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(coarse).resize((60, 48), Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.fixture(scope="module", params=["host", "device"])
def logged(request, tiny_command, flowers, tmp_path_factory):
    """The setup of a run whose data tasks have made two epochs of a step each."""
    folder = tmp_path_factory.mktemp(request.param)
    data = shutil.copytree(flowers, folder / "data")
    options = {"--data.path": data, "--data.test-path": "", "--views.where": request.param}
    command, _ = parse_pretrain(tiny_command(folder / "run", options))
    run = RunDirectory(folder / "run")
    setup = build(command.config, run)
    with run.lock():
        run.create(command.config, setup.feed.index.hash)
    for step in range(2):
        setup.feed.rows(np.arange(32) + 32 * step)
    return setup


@pytest.fixture
def copy(logged, tmp_path):
    """A copy of the run that a test may spoil."""
    return RunDirectory(shutil.copytree(logged.run.path, tmp_path / "run"))


def replay(run, epoch, row, *options):
    with pytest.raises(SystemExit) as ended:
        main([str(run.path), "--epoch", str(epoch), "--row", row, *options])
    return ended.value.code


def test_a_row_is_rebuilt_bit_for_bit_and_drawn(logged, capsys):
    row = action_log.read(logged.run.actions, 1).slice(3, 1).to_pylist()[0]
    assert replay(logged.run, 1, row["row_id"]) == 0
    said = capsys.readouterr().out
    assert f"row {row['row_id']} of epoch 1, step 1: rebuilt bit for bit" in said
    assert "brightness" in said
    picture = logged.run.pictures / f"replay-1-{row['row_id'].replace('/', '_')}"
    assert min(Image.open(picture).size) > 200
    assert str(picture) in said


def test_every_logged_row_is_what_the_workers_got(logged):
    for epoch in range(2):
        for row_id in action_log.read(logged.run.actions, epoch)["row_id"].to_pylist():
            row = find_row(logged.run, epoch, row_id)
            columns = rebuild(logged, row)
            assert columns["counter"] == row["counter"]
            assert columns["action"][0].tolist() == row["action"]


def test_the_picture_goes_where_it_is_wanted(logged, tmp_path, capsys):
    row_id = action_log.read(logged.run.actions, 0)["row_id"][0].as_py()
    assert replay(logged.run, 0, row_id, "--output", str(tmp_path / "here.png")) == 0
    assert (tmp_path / "here.png").exists()
    assert replay(logged.run, 0, row_id, "--output", str(tmp_path / "no" / "such" / "here.png")) == 2
    assert "choose another --output" in capsys.readouterr().err


@pytest.mark.parametrize("restored", [False, True], ids=["new mtime", "same size and mtime"])
def test_a_changed_image_is_noticed(logged, capsys, restored):
    rows = action_log.read(logged.run.actions, 1).to_pylist()
    row = rows[5 + restored]
    path = Path(logged.feed.index.path(row["sample"]))
    before, times = path.read_bytes(), path.stat()
    image = np.array(Image.open(path))
    image[::2, ::2] ^= 64
    Image.fromarray(image).save(path)
    if restored:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    try:
        assert replay(logged.run, 1, row["row_id"]) == 1
        error = capsys.readouterr().err
        assert f"row {row['row_id']}: " in error
        assert "checksum is" in error
        assert "the image, the configuration or the code" in error
        os.truncate(path, 40)
        assert replay(logged.run, 1, row["row_id"]) == 1
        assert "can't be decoded any more" in capsys.readouterr().err
    finally:
        path.write_bytes(before)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    ("section", "field", "value", "words"),
    [
        (None, "seed", 5, "the seed or the images"),
        ("masks", "block_scale", [0.16, 0.2], "mask_blocks is"),
        ("views", "hue", 0.3, "action is"),
        ("views", "crop_scale", [0.5, 1.0], "_checksum is"),
    ],
)
def test_a_changed_configuration_is_noticed(copy, capsys, section, field, value, words):
    tree = json.loads(copy.config.read_text())
    (tree[section] if section else tree)[field] = value
    copy.config.write_text(json.dumps(tree))
    codes = [replay(copy, 0, row) for row in action_log.read(copy.actions, 0)["row_id"].to_pylist()[:4]]
    assert 1 in codes  # a hue that was not jittered stays what it was
    assert words in capsys.readouterr().err


def test_an_unknown_row_or_epoch_is_refused_with_a_suggestion(logged, tmp_path, capsys):
    row_id = action_log.read(logged.run.actions, 0)["row_id"][0].as_py()
    assert replay(logged.run, 0, row_id.replace(".png", ".jpg")) == 2
    assert replay(logged.run, 7, row_id) == 2
    assert replay(RunDirectory(tmp_path), 0, row_id) == 2
    assert replay(logged.run, "first", row_id) == 2
    wrong, no_epoch, no_run, no_number = capsys.readouterr().err.splitlines()
    assert "not among the 32 logged rows of epoch 0; did you mean" in wrong
    assert "--epoch 7: nothing logged" in no_epoch
    assert "config.json" in no_run
    assert "--epoch" in no_number


def test_a_quarantined_row_has_nothing_to_rebuild(tiny_command, flowers, tmp_path, capsys):
    data = shutil.copytree(flowers, tmp_path / "data")
    (data / "rose" / "001.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    options = {"--data.path": data, "--data.test-path": ""}
    command, _ = parse_pretrain(tiny_command(tmp_path / "run", options))
    run = RunDirectory(tmp_path / "run")
    setup = build(command.config, run)
    with run.lock():
        run.create(command.config, setup.feed.index.hash)
    for epoch in range(6):
        setup.feed.rows(np.arange(32) + 32 * epoch)
    rows = action_log.read(run.actions).to_pylist()
    bad = next(row for row in rows if row["error"])
    assert bad["row_id"] == "rose/001.png"
    assert replay(run, bad["epoch"], bad["row_id"]) == 1
    assert "was quarantined" in capsys.readouterr().err
