"""The doctor on this machine, and on one that is ill."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from iwm_ray import doctor


@pytest.fixture
def look(capsys, tmp_path, monkeypatch):
    """`look(*options)`: exit code, lines by what they are about, and what stands on stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*options):
        with pytest.raises(SystemExit) as ended:
            doctor.main(["--tracking.uri", "sqlite:///mlflow.db", "--runtime.cache", str(tmp_path), *options])
        said = capsys.readouterr()
        rows = [line.split(maxsplit=2) for line in said.out.splitlines()]
        return ended.value.code, {about: (state, what) for state, about, what in rows}, said.err

    return call


def test_nothing_is_wrong_here_and_nothing_is_created(look, tmp_path):
    code, found, _ = look("--runtime.engine", "local")
    assert code == 0
    assert {"libraries", "machine", "storage", "tracking"} <= set(found)
    assert "torch " in found["libraries"][1]
    assert "Ray" not in found
    assert list(tmp_path.iterdir()) == []


def test_a_missing_and_an_old_library_are_named_with_the_fix(look, monkeypatch):
    def ill(name):
        if name == "timm":
            raise PackageNotFoundError
        return "0.1" if name == "pyarrow" else real(name)

    real = doctor.version
    monkeypatch.setattr(doctor, "version", ill)
    code, found, said = look("--runtime.engine", "local")
    assert code == 1
    assert found["timm"] == ("wrong", "missing; pip install 'timm>=1.0.20'")
    assert found["pyarrow"][1].startswith("0.1 is installed; pip install 'pyarrow")
    assert "2 of" in said


def test_a_torchvision_that_does_not_fit_torch_is_named(look, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    code, found, _ = look("--runtime.engine", "local")
    assert code == 1
    assert "together with torch" in found["torchvision"][1]


def test_a_cluster_that_is_not_there_and_a_store_of_no_known_kind(tmp_path):
    """In a process of its own: in this one the tests' cluster may be connected already."""
    command = [sys.executable, "-m", "iwm_ray.doctor", "--tracking.uri", "file:/nowhere"]
    environment = os.environ | {"RAY_ADDRESS": "127.0.0.1:9", "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 1, ended.stderr
    assert "no Ray cluster there" in ended.stdout
    assert "file stores" in ended.stdout


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_cannot_be_written_is_named(look, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    code, found, _ = look("--runtime.engine", "local", "--output", str(closed / "run"))
    assert code == 1
    assert "choose another folder" in found["storage"][1]


@pytest.mark.ray
def test_it_asks_every_node_of_the_cluster(look, ray_cluster):
    code, found, _ = look()
    assert code == 0, found
    assert ray_cluster in found["Ray"][1]
    assert "every node runs our code" in found["Ray"][1]


@pytest.mark.ray
def test_more_than_the_cluster_has_is_wrong(look, ray_cluster):
    code, found, _ = look("--runtime.num-workers", "64", "--optimizer.global-batch-size", "64")
    assert code == 1
    assert "lower runtime.num_workers" in found["Ray"][1]
