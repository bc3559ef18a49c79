import json
import os
from pathlib import Path

import pytest

from iwm_ray import run_directory
from iwm_ray.cli import validate
from iwm_ray.errors import UsageError
from iwm_ray.recipes import photos_tiny
from iwm_ray.run_directory import RunDirectory, read_config, read_lines, write_json


def other(section, **changes):
    tree = photos_tiny().model_dump()
    tree[section] |= changes
    return validate(tree)


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    with run.lock():
        run.create(photos_tiny(), "0123")
    return run


def test_a_new_run_records_configuration_and_environment(run):
    assert read_config(run.path) == photos_tiny()
    environment = json.loads(run.environment.read_text())
    assert environment["data_hash"] == "0123"
    assert environment["versions"]["torch"]
    assert {"python", "platform", "cpus", "git_commit"} <= environment.keys()
    assert run.actions.is_dir() and run.checkpoints.is_dir() and run.pictures.is_dir()


def test_the_same_configuration_goes_on_and_clears_what_ended_the_last_start(run):
    run.stop_request.touch()
    run.failure.write_text("no luck")
    before = run.config.read_bytes()
    elsewhere = other("runtime", num_workers=2, engine="local")  # where it runs is not what it computes
    run.check(elsewhere)
    run.create(elsewhere, "0123")
    assert run.config.read_bytes() == before
    assert not run.stop_request.exists() and not run.failure.exists()


def test_another_configuration_is_refused_by_the_name_of_the_setting(run):
    with pytest.raises(UsageError, match=r"optimizer\.lr 0\.001 != 0\.002; choose another --output"):
        run.check(other("optimizer", lr=0.002))
    with pytest.raises(UsageError, match=r"views\.image_size .* \(\+1 more\)"):
        run.check(other("views", image_size=64, blur_probability=0.5))


def test_other_images_are_refused(run):
    with pytest.raises(UsageError, match="images are not those"):
        run.create(photos_tiny(), "4567")


@pytest.mark.parametrize("name", ["file", "file/run", "full", "/proc/iwm_ray/run", "x" * 300])
def test_a_place_where_no_run_can_live_is_refused(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    before = sorted(tmp_path.rglob("*"))
    run = RunDirectory(tmp_path / name)
    with pytest.raises(UsageError, match="choose another --output"):  # noqa: PT012 (either may see it)
        run.check(photos_tiny())
        with run.lock():
            pass
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="not a writable folder"):
        RunDirectory(tmp_path / "run").check(photos_tiny())


def test_a_kill_at_any_moment_of_the_creation_leaves_a_place_that_the_same_command_takes(
    tmp_path, monkeypatch
):
    """`os.replace` and `mkdir` are the moments at which files appear; the process dies before each of them in turn."""
    config = photos_tiny()

    class Killed(BaseException):
        pass

    def die_after(count):
        left = count

        def step(function):
            def wrapper(*arguments, **options):
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                return function(*arguments, **options)

            return wrapper

        monkeypatch.setattr(Path, "mkdir", step(Path.mkdir))
        monkeypatch.setattr(Path, "replace", step(Path.replace))

    for moments in range(20):
        run = RunDirectory(tmp_path / str(moments))
        try:
            with monkeypatch.context() as monkeypatch:
                die_after(moments)
                with run.lock():
                    run.create(config, "0123")
        except Killed:
            run.check(config)
            with run.lock():
                run.create(config, "0123")
            assert read_config(run.path) == config
        else:
            break
    assert moments > 4


def test_a_live_run_is_not_disturbed(run):
    with run.lock():
        run.stop_request.touch()
        with (
            pytest.raises(UsageError, match=rf"a run is live there \(pid {os.getpid()} on .* since "),
            run.lock(),
        ):
            pass
        assert run.stop_request.exists()
    with run.lock():  # it has ended
        pass


def test_torn_lines_are_left_out(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a": 2{"a": 3}\n{"a": 4}\n{"a"')
    assert read_lines(path) == [{"a": 1}, {"a": 4}]
    assert read_lines(tmp_path / "none") == []


def test_a_sample_counts_once_however_often_it_was_met(tmp_path):
    run = RunDirectory(tmp_path)
    assert run.num_quarantined() == 0
    lines = [{"row_id": name, "path": name, "reason": "cut"} for name in ("a", "b", "a")]
    run.quarantine.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run.num_quarantined() == 2


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no config.json there; give the folder that a training run wrote"),
        (b"{", "config.json is damaged; bring it back, or remove this folder"),
        (b"\xff", "config.json is damaged; bring it back, or remove this folder"),
        (
            b'{"recipe": "x", "unknown": 1}',
            r"config.json is another version's \(unknown: .*; use the version",
        ),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(tmp_path, content, said):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UsageError, match=f"RUN {tmp_path}: {said}") as raised:
        read_config(tmp_path)
    assert "\n" not in str(raised.value) and "validation error" not in str(raised.value)


def test_the_environment_is_known_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert run_directory.environment()["git_commit"] is None
