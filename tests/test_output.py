from pathlib import Path

import pytest

from iwm_ray.errors import UsageError
from iwm_ray.output import new_output, refuse_url


def test_what_is_new_or_empty_is_taken_and_its_folder_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert new_output(tmp_path / "empty") == tmp_path / "empty"
    from_here = tmp_path.relative_to(tmp_path) / "deep/er/file.parquet"
    assert new_output(from_here) == tmp_path / "deep/er/file.parquet"
    assert list((tmp_path / "deep/er").iterdir()) == []


def test_what_is_there_or_cannot_be_written_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    for url in (Path("s3://bucket/x"), Path("s3://bucket/x").absolute()):
        with pytest.raises(UsageError, match="--output s3://bucket/x: is no folder; give one"):
            refuse_url(url)
    for path, word in (
        (tmp_path, "there already"),
        (tmp_path / "file", "there already"),
        (tmp_path / "file" / "below", "not writable"),
        (tmp_path / "file" / "far" / "below", "not writable"),
        ("/proc/x", "not writable"),
    ):
        with pytest.raises(UsageError, match=rf"--output {path}: .*{word}") as error:
            new_output(Path(path))
        assert "\n" not in str(error.value)
