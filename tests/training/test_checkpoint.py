import errno
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from iwm_ray.errors import RunError, UsageError
from iwm_ray.training import checkpoint
from iwm_ray.training.checkpoint import (
    load,
    load_model,
    newest_valid,
    next_generation,
    open_checkpoint,
    save,
)


@pytest.fixture
def trained(toy):
    state = toy.state()
    toy.train(state, until=2)
    return state


@pytest.fixture
def two(toy, trained, tmp_path):
    """A folder with the checkpoints of steps 2 and 3."""
    generation = next_generation(tmp_path)
    save(tmp_path, trained, {"samples": 16}, generation)
    toy.train(trained, until=3)
    save(tmp_path, trained, {"samples": 24}, generation)
    return tmp_path


def names(directory):
    return sorted(path.name for path in directory.iterdir() if not path.name.startswith(".generation"))


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(toy, same, tmp_path):
    uninterrupted, interrupted, resumed = toy.state(), toy.state(), toy.state()
    toy.train(uninterrupted, until=7)
    toy.train(interrupted, until=3)
    save(tmp_path, interrupted, {"epoch": 1}, next_generation(tmp_path))
    found = newest_valid(tmp_path)
    load(found, resumed)
    assert found.step == 3
    assert found.state.extra == {"epoch": 1}
    assert found.config == resumed.config
    assert same(resumed, interrupted)
    toy.train(resumed, until=7)
    assert same(resumed, uninterrupted)


def test_step_zero_can_be_saved_and_resumed(toy, same, tmp_path):
    start, resumed = toy.state(), toy.state()
    save(tmp_path, start, {}, next_generation(tmp_path))
    toy.train(resumed, until=2)
    load(newest_valid(tmp_path), resumed)
    assert same(resumed, toy.state())


def test_skipped_steps_are_remembered(toy, trained, tmp_path):
    trained.skipped = torch.tensor([5, 2])
    save(tmp_path, trained, {}, next_generation(tmp_path))
    resumed = toy.state()
    load(newest_valid(tmp_path), resumed)
    assert resumed.skipped.tolist() == [5, 2]


def test_weights_alone_for_evaluation(toy, trained, tmp_path):
    path = save(tmp_path, trained, {}, next_generation(tmp_path)).path
    model = toy.state().model
    load_model(open_checkpoint(path), model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.model.parameters(), strict=True))


def test_nothing_there_is_none(tmp_path):
    assert newest_valid(tmp_path) is None
    assert newest_valid(tmp_path / "nowhere") is None
    with pytest.raises(UsageError, match=r"no MANIFEST\.json there"):
        open_checkpoint(tmp_path)


# F7: a kill at any instant


def die_at(k, save_again):
    """Runs `save_again` in a child that dies at its k-th change of the disk; returns whether it came to its end."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    count = 0

    def dying(function, halfway=lambda *_: None):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count == k:
                halfway(*arguments)
                os._exit(1)
            return function(*arguments, **options)

        return call

    def half_a_file(tensors, path):
        save_file(tensors, path)
        os.truncate(path, path.stat().st_size // 2)

    for name in ("fsync", "rename", "mkdir", "unlink", "rmdir", "open", "close"):
        setattr(os, name, dying(getattr(os, name)))
    checkpoint.save_file = dying(save_file, half_a_file)
    Path.write_bytes = dying(
        Path.write_bytes, lambda path, data: path.open("wb").write(data[: len(data) // 2])
    )
    Path.write_text = dying(Path.write_text, lambda path, text: path.open("w").write(text[: len(text) // 2]))
    save_again()
    os._exit(0)


@pytest.mark.parametrize("over", ["nothing", "two", "damaged"])
def test_a_kill_at_any_instant_leaves_the_previous_or_the_new_one(toy, same, tmp_path, monkeypatch, over):
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: None
    )  # a kill does not lose what the system has taken
    older, newer, resumed, template = toy.state(), toy.state(), toy.state(), tmp_path / "template"
    generation = next_generation(template)
    for step in (1, 2) if over != "nothing" else ():
        toy.train(older, until=step)
        save(template, older, {}, generation)
    toy.train(newer, until=3)
    if over == "damaged":  # the step that is saved again has a damaged checkpoint
        os.truncate(save(template, newer, {}, generation).path / "model.safetensors", 10)
    k, finished = 0, False
    while not finished:
        k += 1
        directory = shutil.copytree(template, tmp_path / str(k))
        finished = die_at(k, lambda directory=directory: save(directory, newer, {}, generation))
        found = newest_valid(directory)
        assert found or (over == "nothing" and not finished)
        if found:
            load(found, resumed)
            assert same(resumed, newer if found.step == 3 else older)
            assert found.step == 3 or not finished
        # Whatever was left: the next attempt clears it, and saves.
        assert save(directory, newer, {}, next_generation(directory)).warning == ""
        assert newest_valid(directory).step == 3
        assert [name for name in names(directory) if name.startswith(".")] == []
        shutil.rmtree(directory)
    assert k > 15


# F8: a full or failing disk


def files_limited_to(num_bytes, directory):
    """Saves in a process that can't write files beyond a size, as on a full disk; returns what it printed."""
    script = """if True:
        import resource, signal, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from conftest import ToyRun
        from iwm_ray.training.checkpoint import newest_valid, next_generation, save
        toy, directory = ToyRun(), Path(sys.argv[2])
        state = toy.state()
        toy.train(state, until=1)
        generation = next_generation(directory)
        save(directory, state, {}, generation)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for number, limit in enumerate(sys.argv[3:], start=2):
            toy.train(state, until=number)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
            saved = save(directory, state, {}, generation)
            print(saved.path is None, newest_valid(directory).step, sorted(p.name for p in directory.iterdir()))
            print(saved.warning)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(save(directory, state, {}, generation))
    """
    here = Path(__file__)
    done = subprocess.run(
        [sys.executable, "-c", script, here.parent, directory, *map(str, num_bytes)],
        env=os.environ | {"PYTHONPATH": str(here.parents[2])}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


def test_a_full_disk_costs_a_checkpoint_but_not_the_run(tmp_path):
    limits = [0, 1, 100, 5_000, 50_000, 100_000, 200_000]
    lines = files_limited_to(limits, tmp_path)
    for line, warning in zip(lines[0:-1:2], lines[1:-1:2], strict=True):
        assert line == "True 1 ['.generation-1', 'step_00000001']"
        assert "not written, training goes on" in warning
        assert "MB are free" in warning
    assert "step_00000008" in lines[-1]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("name", ["fsync", "rename", "mkdir"])
def test_a_failing_disk_costs_a_checkpoint_but_not_the_run(two, toy, trained, monkeypatch, name, code):
    before = names(two)
    toy.train(trained, until=4)

    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        saved = save(two, trained, {}, 1)
    assert saved.path is None
    assert os.strerror(code) in saved.warning
    assert "\n" not in saved.warning
    assert names(two) == before
    assert newest_valid(two).step == 3
    assert save(two, trained, {}, 1).path == two / "step_00000004"


def test_an_old_checkpoint_that_can_not_be_removed_is_no_failure(two, toy, trained, monkeypatch):
    toy.train(trained, until=4)
    really = os.rename

    def fail(source, target):
        if ".trash" in str(target):
            raise OSError(errno.EIO, "broken")
        really(source, target)

    monkeypatch.setattr(os, "rename", fail)
    saved = save(two, trained, {}, 1)
    assert saved.path == two / "step_00000004"
    assert "older ones could not be removed" in saved.warning


# F9: damage


def files_of(path):
    return [
        path / name for name in ("MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json")
    ]


def test_every_flipped_bit_is_noticed(two):
    draw = random.Random(0)
    for file in files_of(two / "step_00000003"):
        data = file.read_bytes()
        positions = [0, len(data) - 1, *(draw.randrange(len(data)) for _ in range(10))]
        for position in positions:
            flipped = bytearray(data)
            flipped[position] ^= 1 << draw.randrange(8)
            file.write_bytes(flipped)
            found = newest_valid(two)
            assert found.step == 2, (file.name, position)
            assert "step_00000003" in found.skipped[0]
        file.write_bytes(data)
    assert newest_valid(two).step == 3


@pytest.mark.parametrize(
    "name", ["MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json"]
)
def test_every_cut_deleted_or_swapped_file_is_noticed(two, name):
    file, older = two / "step_00000003" / name, two / "step_00000002" / name
    data = file.read_bytes()
    for length in (0, 1, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:length])
        assert newest_valid(two).step == 2
    for changed in (data + b" ", b"\0" * len(data), older.read_bytes()):
        file.write_bytes(changed)
        assert newest_valid(two).step == 2
    file.unlink()
    assert newest_valid(two).step == 2
    file.mkdir()
    assert newest_valid(two).step == 2
    file.rmdir()
    os.mkfifo(file)  # opening it must not wait for a writer
    assert newest_valid(two).step == 2
    file.unlink()
    elsewhere = two / "elsewhere"
    elsewhere.write_bytes(data)
    file.symlink_to(elsewhere)
    assert newest_valid(two).step == 2
    file.unlink()
    file.write_bytes(data)
    assert newest_valid(two).step == 3


def test_swapped_and_linked_folders_are_noticed(two):
    (two / "step_00000003").rename(two / "step_00000009")
    found = newest_valid(two)
    assert found.step == 2
    assert found.skipped == ("step_00000009: holds step 3",)
    (two / "step_00000009").rename(two / "aside")
    (two / "step_00000003").symlink_to(two / "aside")
    assert newest_valid(two).step == 2


def test_nothing_intact_ends_the_run_with_the_list(two):
    for step in (2, 3):
        os.truncate(two / f"step_0000000{step}" / "state.json", 3)
    with pytest.raises(
        RunError, match=r"no intact checkpoint .*step_00000003: state\.json has 3 bytes.*step_00000002"
    ):
        newest_valid(two)
    with pytest.raises(RunError, match=r"is damaged: state\.json"):
        open_checkpoint(two / "step_00000003")


def reseal(path, **changes):
    """Rewrites a manifest as an attacker or a later version would: with a matching checksum."""
    tree = json.loads((path / "MANIFEST.json").read_text())
    tree.pop("checksum")
    (path / "MANIFEST.json").write_bytes(checkpoint.sealed(tree | changes))


def test_manifests_name_the_three_files_and_nothing_else(two):
    path = two / "step_00000003"
    files = json.loads((path / "MANIFEST.json").read_text())["files"]
    for name in ("../step_00000002/model.safetensors", "/etc/passwd", "model.pkl", ""):
        reseal(path, files=[files[0] | {"name": name}, *files[1:]])
        assert newest_valid(two).step == 2
    for wrong in (files[:2], [*files, files[0]], [], None, [[[]]]):
        reseal(path, files=wrong)
        assert newest_valid(two).step == 2
    for wrong in ({"step": "3"}, {"sequence": None}, {"surprise": 1}, {"metric": "nan"}):
        reseal(path, **({"files": files} | wrong))
        assert newest_valid(two).step == 2
    for text in (b"[]", b"null", b"[" * 50_000, b'{"checksum": 1}', b"\xff\xfe", b"{}"):
        (path / "MANIFEST.json").write_bytes(text)
        assert newest_valid(two).step == 2


def test_a_newer_format_is_not_passed_over_silently(two):
    reseal(two / "step_00000003", format_version=2)
    with pytest.raises(UsageError, match="written by a newer iwm_ray"):
        newest_valid(two)


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"]
)
def test_a_pickled_payload_is_never_executed(two, toy, name):
    path, marker = two / "step_00000003", two / "executed"
    (path / name).write_bytes(pickle.dumps(Payload(marker)))
    if name != "MANIFEST.json":
        reseal(path, files=[checkpoint.record(path / file).model_dump() for file in checkpoint.FILES])
    state = toy.state()
    try:
        load(newest_valid(two), state)
    except RunError as error:
        assert "is no safetensors file" in str(error)  # noqa: PT017 (either way out is right)
    assert not marker.exists()


# Which is the newest, which are kept


def test_the_newest_is_told_by_sequence_not_by_clock_or_name(toy, trained, tmp_path):
    generation = next_generation(tmp_path)
    toy.train(trained, until=5)
    save(tmp_path, trained, {}, generation)
    early = toy.state()
    toy.train(early, until=1)
    save(tmp_path, early, {}, generation)  # a run that had to go back
    os.utime(tmp_path / "step_00000001", (0, 0))
    os.utime(tmp_path / "step_00000005", (2**33, 2**33))
    assert newest_valid(tmp_path).step == 1


def test_the_last_two_and_the_best_are_kept(toy, tmp_path):
    state, generation = toy.state(), next_generation(tmp_path)
    metrics = [0.1, 0.9, float("nan"), 0.5, None, 0.3]
    for step, metric in enumerate(metrics, start=1):
        toy.train(state, until=step)
        save(tmp_path, state, {}, generation, metric)
    assert names(tmp_path) == ["step_00000002", "step_00000005", "step_00000006"]


def test_a_damaged_checkpoint_does_not_count_as_kept(two, toy, trained):
    os.truncate(two / "step_00000003" / "model.safetensors", 5)
    toy.train(trained, until=4)
    save(two, trained, {}, 1)
    assert names(two) == ["step_00000002", "step_00000004"]


def test_a_step_that_is_saved_twice_stays_as_it_is(two, trained):
    before = (two / "step_00000003" / "MANIFEST.json").read_bytes()
    assert save(two, trained, {"samples": 24}, 1).path == two / "step_00000003"
    assert (two / "step_00000003" / "MANIFEST.json").read_bytes() == before


def test_a_damaged_checkpoint_is_replaced_by_the_same_step(two, trained):
    os.truncate(two / "step_00000003" / "model.safetensors", 5)
    save(two, trained, {}, 1)
    assert newest_valid(two).step == 3
    assert names(two) == ["step_00000002", "step_00000003"]


# Attempts


def test_an_older_attempt_can_not_write(toy, trained, tmp_path):
    old = next_generation(tmp_path)
    new = next_generation(tmp_path)
    assert (old, new) == (1, 2)
    with pytest.raises(RunError, match="attempt 2 has taken over"):
        save(tmp_path, trained, {}, old)
    assert names(tmp_path) == []
    assert save(tmp_path, trained, {}, new).path is not None


def test_a_new_attempt_clears_what_an_older_one_left(two):
    shutil.copytree(two / "step_00000002", two / ".stage-4-1")
    shutil.copytree(two / "step_00000002", two / ".trash-step_00000001")
    assert next_generation(two) == 2
    assert names(two) == ["step_00000002", "step_00000003"]


def test_numbers_are_taken_once(tmp_path):
    children = []
    for _ in range(4):
        child = os.fork()
        if not child:
            os._exit(sum(next_generation(tmp_path) > 0 for _ in range(5)) - 5)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert len(list(tmp_path.iterdir())) == 20


# What does not fit


def test_another_configuration_is_named_in_one_line(toy, two):
    other = toy.config().model_copy(update={"seed": 5})
    wide = toy.config()
    wide = wide.model_copy(update={"encoder": wide.encoder.model_copy(update={"width": 64})})
    for config, words in ((other, "seed 0 != 5; choose"), (wide, r"encoder\.width 32 != 64; choose another")):
        state = toy.state(config)
        with pytest.raises(UsageError, match=words) as raised:
            load(newest_valid(two), state)
        assert "\n" not in str(raised.value)
        assert state.step == 0


def test_where_and_how_fast_may_change(toy, two):
    state = toy.state(toy.config(runtime={"accumulation_steps": 2}))
    load(newest_valid(two), state)
    assert state.step == 3


def test_another_length_of_the_run_is_refused(toy, two):
    state = toy.state()
    state.total_steps = 50
    with pytest.raises(UsageError, match="of a run of 100 steps, this one has 50"):
        load(newest_valid(two), state)


def test_another_model_is_named_in_one_line_and_left_as_it_is(toy, two):
    config = toy.config()
    wide = config.model_copy(update={"encoder": config.encoder.model_copy(update={"width": 64})})
    model = toy.state(wide).model
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(UsageError, match=r"does not fit: encoder\.\S+ F32\[.*\] != F32\[.*\] \(\+\d+ more\)"):
        load_model(newest_valid(two), model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_missing_moments_are_refused_before_the_weights_are_touched(toy, two):
    path = two / "step_00000003"
    save_file({"step.predictor.mask_token": torch.ones(())}, path / "optimizer.safetensors")
    reseal(path, files=[checkpoint.record(path / file).model_dump() for file in checkpoint.FILES])
    state = toy.state()
    before = [parameter.clone() for parameter in state.model.parameters()]
    with pytest.raises(UsageError, match=r"does not fit: exp_avg\.encoder\.\S+ missing"):
        load(newest_valid(two), state)
    assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))


def test_weights_that_are_not_finite_are_never_saved(toy, trained, tmp_path):
    with torch.no_grad():
        trained.model.predictor.mask_token[0] = torch.inf
    with pytest.raises(RunError, match=r"step 2 is not saved: not finite are predictor\.mask_token"):
        save(tmp_path, trained, {}, next_generation(tmp_path))
    assert names(tmp_path) == []
