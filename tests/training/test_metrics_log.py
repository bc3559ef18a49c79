import errno
import json
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iwm_ray.training.metrics_log import MetricsLog, read


def series(path, name):
    return [(line["step"], line[name]) for line in read(path) if name in line]


def test_lines_hold_plain_numbers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append(
        np.int64(10), {"train/loss": torch.tensor(0.5), "train/rate": np.float32(0.25), "train/count": 3}
    )
    log.sync()
    (line,) = [json.loads(text) for text in path.read_text().splitlines()]
    assert line.pop("time") > 1.7e9
    assert line == {"step": 10, "train/loss": 0.5, "train/rate": 0.25, "train/count": 3.0}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null(tmp_path, value):
    log = MetricsLog(tmp_path / "m")
    log.append(1, {"train/loss": value, "train/rate": 1})
    assert series(tmp_path / "m", "train/loss") == [(1, None)]
    assert series(tmp_path / "m", "train/rate") == [(1, 1.0)]


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_no_metric_is_lost_or_doubled_however_often_the_run_is_killed(data, tmp_path_factory):
    """Steps 1..30 with three groups at their own steps; kills anywhere, also within a line."""
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    every = {"train/loss": 2, "monitor/rank": 5, "eval/knn": 15}
    step, log, checkpoint, seen = 0, MetricsLog(path), 0, b""
    kills = data.draw(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 40)), max_size=4))
    while step < 30:
        step += 1
        for name, period in every.items():
            if step % period == 0:
                log.append(step, {name: step * 10})
        if step % 7 == 0:
            log.sync()
            checkpoint, seen = step, path.read_bytes()
        if kills and step == kills[0][0]:
            _, torn = kills.pop(0)
            size = path.stat().st_size
            os.truncate(path, max(size - torn, len(seen)))  # the system had not written the last bytes
            step, log = checkpoint, MetricsLog(path)
        assert path.read_bytes().startswith(seen)  # lines never change
    for name, period in every.items():
        assert series(path, name) == [(s, s * 10) for s in range(period, 31, period)]


def test_each_name_has_its_own_last_step(tmp_path):
    log = MetricsLog(tmp_path / "m")
    log.append(10, {"train/loss": 1})
    log.append(10, {"train/wait": 2})
    log.append(5, {"monitor/rank": 3, "train/loss": 9})
    log.append(10, {"train/loss": 9})
    assert [line | {"time": 0} for line in read(tmp_path / "m")] == [
        {"step": 10, "time": 0, "train/loss": 1.0},
        {"step": 10, "time": 0, "train/wait": 2.0},
        {"step": 5, "time": 0, "monitor/rank": 3.0},
    ]


@pytest.mark.parametrize("tail", [b'{"step": 3, "ti', b'{"step": 3, "time": 1, "a": 2}', b"\xff\0"])
def test_a_torn_last_line_is_cut_off(tmp_path, tail):
    path = tmp_path / "m"
    MetricsLog(path).append(2, {"a": 1})
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert len(read(path)) == 1
    log = MetricsLog(path)
    assert path.read_bytes() == whole
    log.append(3, {"a": 2})
    assert series(path, "a") == [(2, 1.0), (3, 2.0)]


def test_damaged_lines_are_passed_over(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(
        b'{"step": 1, "time": 1.0, "a": 1}\nnot json\n[]\n{"step": "x"}\n\n{"step": 2, "time": 2.0, "a": 2}\n'
    )
    assert series(path, "a") == [(1, 1), (2, 2)]
    MetricsLog(path).append(3, {"a": 3})
    assert series(path, "a")[-1] == (3, 3.0)


def test_a_full_disk_delays_lines_but_loses_none(tmp_path, monkeypatch):
    path = tmp_path / "m"
    log = MetricsLog(path)
    log.append(1, {"a": 1})
    whole = path.read_bytes()
    really = type(path).open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def truncate(self, size):
            self.file.truncate(size)

        def write(self, data):
            self.file.write(data[:7])
            raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(type(path), "open", lambda *args, **options: Full(really(*args, **options)))
        log.append(2, {"a": 2})
        log.append(3, {"a": 3})
    assert path.read_bytes() == whole + b'{"step"'
    assert series(path, "a") == [(1, 1.0)]
    log.append(4, {"a": 4})
    assert path.read_bytes().startswith(whole)
    assert series(path, "a") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_time_never_falls(tmp_path, monkeypatch):
    path, clock = tmp_path / "m", [1000.0]
    monkeypatch.setattr("time.time", lambda: clock[0])
    log = MetricsLog(path)
    for step, now in enumerate((1000.0, 1001.0, 500.0)):
        clock[0] = now
        log.append(step, {"a": 1})
    clock[0] = 10.0
    MetricsLog(path).append(9, {"a": 1})
    assert [line["time"] for line in read(path)] == [1000.0, 1001.0, 1001.0, 1001.0]


def test_a_missing_file_is_empty(tmp_path):
    assert read(tmp_path / "nowhere") == []
