import platform
import resource
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from iwm_ray import action_log
from iwm_ray.build import build
from iwm_ray.cli import validate
from iwm_ray.feed import _found_whole, checksums_of
from iwm_ray.recipes import photos_tiny
from iwm_ray.run_directory import RunDirectory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty images of noise in two classes, two of which are cut off."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(40):
        path = folder / "ab"[number % 2] / f"{number:02}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 255, (40 + number, 50, 3), dtype=np.uint8)).save(path)
        if number in (7, 20):
            path.write_bytes(path.read_bytes()[:400])
    return folder


@pytest.fixture
def make(folder, tmp_path):
    def setup(where):
        tree = photos_tiny().model_dump()
        tree["data"] |= {"path": str(folder), "test_path": ""}
        tree["views"]["where"] = where
        tree["optimizer"]["global_batch_size"] = 16
        tree["runtime"]["cache"] = str(tmp_path / "cache")
        run = RunDirectory(tmp_path / where)
        run.path.mkdir()
        return build(validate(tree), run)

    return setup


@pytest.mark.parametrize("where", ["host", "device"])
def test_rows_depend_on_their_counter_alone(make, where):
    feed = make(where).feed
    counters = np.arange(20, 60)  # two epochs
    whole = feed.rows(counters)
    for part in (counters[:1], counters[5:18], counters[[30, 2]]):
        for name, values in feed.rows(part).items():
            np.testing.assert_array_equal(values, whole[name][part - 20])


@pytest.mark.parametrize("where", ["host", "device"])
def test_rows_are_the_same_whether_their_images_were_seen_before_or_not(make, where, folder, monkeypatch):
    """With an image whose bytes are damaged, but not cut."""
    path = folder / "a" / "36.jpg"
    encoded = path.read_bytes()
    feed, counters = make(where).feed, np.arange(32, 96)
    damaged = bytearray(encoded)
    damaged[-300:-200] = bytes(100)
    path.write_bytes(damaged)
    try:
        _found_whole.cache_clear()
        feed.rows(np.arange(32))
        again = feed.rows(counters)
        assert _found_whole(feed.index).sum() == 37  # but for the cut ones and the damaged one
        monkeypatch.setattr("iwm_ray.feed._found_whole", lambda index: np.zeros(len(index), bool))
        first = feed.rows(counters)
    finally:
        path.write_bytes(encoded)
    assert (again["weight"] == 0).sum() > 3
    for name, values in again.items():
        np.testing.assert_array_equal(values, first[name])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again(make):
    """Three columns of a block, freed together: more than glibc would keep."""
    make("host").feed.rows(np.arange(4))

    def work():
        return [np.ones(25 << 20, np.uint8) for _ in range(3)]

    work()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        work()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 50


def test_a_sample_that_cannot_be_read_keeps_its_place_without_weight(make):
    setup = make("host")
    counters = np.arange(96)
    rows = setup.feed.rows(counters)
    ids = [setup.feed.index.row_id(int(sample)) for sample in setup.feed.plan.samples(counters)]
    bad = [row_id.endswith(("/07.jpg", "/20.jpg")) for row_id in ids]
    assert sum(bad) >= 3
    np.testing.assert_array_equal(rows["weight"], 1.0 - np.array(bad))
    assert not rows["source"][bad].any()
    setup.feed.rows(counters)
    assert sorted(record["row_id"] for record in setup.run.quarantined()) == ["a/20.jpg", "b/07.jpg"]


def test_the_log_holds_what_was_done_once_for_each_counter(make):
    setup = make("host")
    blocks = [setup.feed.rows(np.arange(first, first + 16)) for first in range(0, 64, 16)]
    setup.feed.rows(np.arange(16, 32))  # a task that ran twice
    log = action_log.read(setup.run.actions)
    np.testing.assert_array_equal(log["counter"].to_numpy(), np.arange(64))
    np.testing.assert_array_equal(log["step"].to_numpy(), np.arange(64) // 16)
    assert set(log["epoch"].to_pylist()) == {0, 1}
    actions = np.concatenate([block["action"] for block in blocks])
    np.testing.assert_array_equal(np.array(log["action"].to_pylist(), np.float32), actions)
    checksums = np.concatenate([checksums_of(block["target"]) for block in blocks])
    np.testing.assert_array_equal(log["target_checksum"].to_numpy(), checksums)


def test_a_part_of_the_blocks_is_logged_where_asked(make, tmp_path):
    feed = make("host").feed
    assert feed.log is not None
    half = replace(feed.log, fraction=0.5)
    wanted = sum(half.wants(first) for first in range(0, 64_000, 64))
    assert 400 < wanted < 600
    assert not replace(feed.log, fraction=0.0).wants(0)
    assert replace(feed.log, fraction=1.0).wants(0)


def test_a_log_that_cannot_be_written_does_not_stop_the_rows(make, tmp_path, caplog):
    feed = make("host").feed
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder should be")
    rows = replace(feed, log=replace(feed.log, folder=blocked)).rows(np.arange(4))
    np.testing.assert_array_equal(rows["source"], feed.rows(np.arange(4))["source"])
    assert "rows from 0 on not written" in caplog.text


def test_losses_stand_beside_the_rows_where_they_are_known(make):
    setup = make("host")
    setup.feed.rows(np.arange(16))
    folder = setup.run.actions
    assert action_log.read(folder)["loss"].null_count == 16
    for step, counters in ((2, [3, 1]), (3, [1, 9])):  # the second worker repeats a step after a fault
        losses = {"counter": np.array(counters), "loss": np.array(counters, np.float32) / 2}
        action_log.write_losses(folder, step, 0, losses)
    expected = [place / 2 if place in (1, 3, 9) else None for place in range(16)]
    assert action_log.read(folder)["loss"].to_pylist() == expected
