"""Samples that end the process that decodes them; here by a decoder that kills itself at a word in the data."""

import contextlib
import json
import os
import textwrap

import numpy as np
import pytest

from iwm_ray.config import DataConfig
from iwm_ray.data.decode import DecodeLimits, Undecodable
from iwm_ray.data.index import Index
from iwm_ray.data.quarantine import Quarantine
from iwm_ray.data.taster import deadly
from iwm_ray.errors import RunError

LIMITS = DecodeLimits(background=(9, 8, 7))


@pytest.fixture
def ill(tmp_path, monkeypatch):
    """Python processes that are started from now on have that decoder; this one has not."""
    code = """
        import os, signal, sys
        import simplejpeg
        decode = simplejpeg.decode_jpeg
        def ill(data, *words, **more):
            if b"SIGKILL" in bytes(data):
                os.kill(os.getpid(), signal.SIGKILL)
            if b"leave" in bytes(data):
                os._exit(3)
            return decode(data, *words, **more)
        simplejpeg.decode_jpeg = ill
    """
    (tmp_path / "ill").mkdir()
    (tmp_path / "ill/sitecustomize.py").write_text(textwrap.dedent(code))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'ill'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


@pytest.fixture
def index(tmp_path, jpeg):
    """Six photographs, the third and the fifth of them deadly."""
    (tmp_path / "data").mkdir()
    for i, end in enumerate([b"", b"", b"SIGKILL", b"", b"leave", b""]):
        (tmp_path / f"data/{i}.jpg").write_bytes(jpeg + end)
    return Index.open(DataConfig(path=str(tmp_path / "data")), str(tmp_path / "data"), tmp_path / "cache")


def test_what_ends_the_taster_is_named_and_the_others_are_tasted(ill, jpeg):
    images = [jpeg, jpeg + b"SIGKILL", b"no image", Undecodable("gone"), jpeg + b"leave", jpeg]
    assert deadly(images, LIMITS) == {
        1: "ends the process that decodes it (SIGKILL)",
        4: "ends the process that decodes it (exit code 3)",
    }


def test_nothing_is_deadly_where_all_is_well(jpeg):
    assert deadly([jpeg, b"", Undecodable("gone")], LIMITS) == {}


def test_a_mark_stays_only_where_the_maker_died(tmp_path):
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    with quarantine.making(7) as died:
        assert not died
        with quarantine.making(7) as died_here:  # as a process would see it whose forerunner was killed
            assert died_here
    with contextlib.suppress(RuntimeError), quarantine.making(7):
        raise RuntimeError
    with quarantine.making(7) as died:
        assert not died


def test_the_deadly_are_found_with_care_and_never_touched_again(ill, index, tmp_path):
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    images = [(tmp_path / "data" / index.row_id(i)).read_bytes() for i in range(6)]

    def sift(careful):
        found = quarantine.sift(index, range(6), images, LIMITS, careful)
        return [index.row_id(i) for i in range(6) if isinstance(found[i], Undecodable)]

    assert sift(careful=False) == []
    assert sift(careful=True) == ["2.jpg", "4.jpg"]
    assert sift(careful=False) == ["2.jpg", "4.jpg"]


def test_bad_samples_are_noted_once(index, tmp_path):
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    for _ in range(2):
        quarantine.add(index, [1, 3], ["torn", "empty"])
    assert len(quarantine.file.read_text().splitlines()) == 2
    images = [np.zeros(1).tobytes()] * 6
    assert (
        quarantine.sift(index, range(6), images, LIMITS, careful=False) == images
    )  # not deadly: tried again


def test_what_was_mended_or_has_left_the_data_is_forgotten(ill, index, tmp_path):
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    quarantine.forget_mended(index, LIMITS)
    assert not quarantine.file.exists()
    quarantine.add(index, [0, 1], ["away", "torn"])
    quarantine.add(index, [2, 3], ["ends", "ended"], are_deadly=True)
    (tmp_path / "data/1.jpg").write_bytes(b"torn")
    gone = json.dumps({"row_id": "gone.jpg", "path": "", "reason": "torn", "deadly": False})
    quarantine.file.write_text(quarantine.file.read_text() + gone + "\n")
    quarantine.forget_mended(index, LIMITS)
    assert [record["row_id"] for record in quarantine.records()] == ["1.jpg", "2.jpg"]
    assert [path.name for path in tmp_path.glob("*quarantine*")] == ["quarantine.jsonl"]


def test_a_torn_line_is_passed_over_and_closed(index, tmp_path):
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    quarantine.file.write_text('{"row_id": "0.jpg", "reas')
    quarantine.add(index, [2], ["ends"], are_deadly=True)
    quarantine.add(index, [2, 3], ["ends", "torn"])
    assert len(quarantine.file.read_text().splitlines()) == 3
    found = quarantine.sift(index, range(6), [b""] * 6, LIMITS, careful=False)
    assert [isinstance(image, Undecodable) for image in found] == [False, False, True, False, False, False]


def test_a_taster_that_cannot_start_condemns_no_image(jpeg, tmp_path, monkeypatch):
    (tmp_path / "simplejpeg.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RunError, match="did not start"):
        deadly([jpeg], LIMITS)
