"""The command line of a sweep document; that sweeps really run is in runtime/test_tune.py."""

from dataclasses import replace

import pytest

from iwm_ray.errors import UsageError
from iwm_ray.finetuning.settings import FinetuneConfig
from iwm_ray.sweep import Plan, _main, _open_report, _parser, make_plan, plan_lines, read_sweep
from iwm_ray.sweeping.record import SweepDirectory
from iwm_ray.sweeping.space import Axis, Sweep, base


def define(size):
    tuned = (
        FinetuneConfig.model_validate({"epochs": 20, "data": {"num_train": 2000}})
        if size == "cifar10"
        else None
    )
    return Sweep("test", "?", base(size), (Axis.of("predictor.depth", 1, 4),), finetune=tuned)


def strengths(size):
    values = {"weak": {"views.hue": 0.1}, "strong": {"views.hue": 0.2, "views.contrast": 0.8}}
    return Sweep("test", "?", base(size), (Axis("strength", values), Axis.of("seed", 0, 1)))


def read(*words, define=define) -> Sweep:
    return read_sweep(define, _parser("?").parse(list(words)))


def test_what_is_asked_of_trials_is_set_by_options():
    sweep = read(
        "--size",
        "cifar10",
        "--measure.images",
        "99",
        "--finetune.seeds",
        "3",
        "4",
        "--finetune.num-test",
        "50",
    )
    assert sweep.measure.images == 99
    assert sweep.finetune.seeds == (3, 4)
    assert (sweep.finetune.epochs, sweep.finetune.data.num_train, sweep.finetune.data.num_test) == (
        20,
        2000,
        50,
    )
    assert read("--size", "cifar10").finetune == define("cifar10").finetune
    assert read("--size", "cifar10", "--no-finetune").finetune is None


def test_a_sweep_without_finetuning_gets_what_is_asked_for():
    assert read().finetune is None
    assert read("--finetune.tune", "predictor", "both").finetune.tune == ("predictor", "both")
    assert read("--finetune.max-bad-fraction", "0.5").finetune.data.max_bad_fraction == 0.5


def test_wrong_values_are_named():
    with pytest.raises(UsageError, match="finetune.epochs '-1'"):
        read("--finetune.epochs", "-1")
    with pytest.raises(UsageError, match="finetune.seeds 1 1"):
        read("--finetune.seeds", "1", "1")
    with pytest.raises(UsageError, match="^finetune.tune 'head': input should be 'predictor'"):
        read("--finetune.tune", "predictor", "head")
    with pytest.raises(UsageError, match="^finetune.num_train '-1'"):
        read("--finetune.num-train", "-1")
    with pytest.raises(UsageError, match="^measure.tasks 'mrrr'"):
        read("--measure.tasks", "rank", "mrrr")


@pytest.mark.parametrize(
    ("define", "words", "said"),
    [
        (define, ["--predictor.depth", "3"], r"^--predictor.depth 3: is set by the axis predictor.depth .* \(1, 4\); drop"),
        (define, ["--predictor.depth=1"], r"^--predictor.depth 1: "),
        (strengths, ["--views.hue", "0.3"], r"^--views.hue 0.3: is set by the axis strength .* \(weak, strong\)"),
        (strengths, ["--views.contrast", "0.3"], r"^--views.contrast 0.3: is set by the axis strength"),
        (define, ["--no-finetune", "--finetune.seeds", "3", "4"], "^--finetune.seeds 3 4: --no-finetune leaves"),
    ],
)  # fmt: skip
def test_what_would_have_no_effect_is_refused(define, words, said):
    with pytest.raises(UsageError, match=said) as error:
        read(*words, define=define)
    assert "\n" not in str(error.value)


def test_what_no_axis_sets_is_free():
    found = read("--views.brightness", "0.3", "--seeds", "5", "6", define=strengths)
    assert found.base.views.brightness == 0.3
    assert list(found.axes[-1].values) == ["5", "6"]


@pytest.fixture
def plan(tmp_path, photo_cache):
    """`plan(*words)`: what the dry run of a sweep of photographs checks."""

    def made(*words: str) -> Plan:
        options = _parser("?").parse(["--runtime.cache", str(photo_cache), "--tracking.uri", "none", *words])
        return make_plan(read_sweep(define, options), SweepDirectory(tmp_path), options)

    return made


def test_a_finetuning_without_its_data_is_refused_before_anything_is_trained(plan):
    tuned = ("--finetune.tune", "predictor")
    assert len(plan(*tuned).left) == 2
    with pytest.raises(
        UsageError, match=r"data.test_path: empty.* give --data.test-path; or .* --no-finetune"
    ):
        plan(*tuned, "--data.test-path", "")
    with pytest.raises(UsageError, match="holds the training images"):
        plan(*tuned, "--data.test-path", "photos_tiny")
    for option in ("path", "test-path"):  # which pretraining lacks as well
        with pytest.raises(UsageError, match="/nope.parquet: does not exist") as error:
            plan(*tuned, f"--data.{option}", "/nope.parquet")
        assert "--no-finetune" not in str(error.value)
    assert len(plan("--data.test-path", "").left) == 2


def test_all_that_is_missing_is_named_at_once(plan):
    with pytest.raises(
        UsageError, match=r"needs --data.path and, for finetuning, --data.test-path \(or --no-f"
    ):
        plan("--size", "cifar10")
    with pytest.raises(UsageError, match=r"needs --data.path: a class-folder tree"):
        plan("--size", "cifar10", "--no-finetune")
    with pytest.raises(UsageError, match=r"needs --data.path: a class-folder tree"):
        plan("--size", "imagenet")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--runtime.num-workers", "8"], "^runtime.num_workers 8: engine local has one worker; set runtime.engine ray"),
        (["--gpus-per-trial", "0.5"], "^--gpus-per-trial 0.5: these trials use no GPU; add --runtime.use-gpu true"),
        (["--gpus-per-trial", "0.5", "--runtime.engine", "ray", "--runtime.use-gpu", "true"], "engine ray gives"),
        (["--gpus-per-trial", "0", "--runtime.use-gpu", "true"], "^--gpus-per-trial 0: needs 1 or a whole part"),
        (["--trials", "1"], "--trials 1: a grid runs every point; add --search random"),
        (["--search", "random"], "--search random: needs --trials N"),
        (["--search", "random", "--trials", "0"], "--trials 0: needs 1 or more"),
        (["--search", "random", "--trials", "-2"], "--trials -2: needs 1 or more"),
        (["--max-failures", "-1"], "--max-failures -1: needs 0 or more"),
        (["--at-once", "-1"], "--at-once -1: needs 0 or more"),
        (["--search", "optuna", "--trials", "1", "--seeds", "0", "1"], "--seeds 0 1: a seed is nothing to search for"),
        (["--asha", "mrr/mrr"], "--asha mrr/mrr: no metric that a training writes .* monitor/knn_top1"),
        (["--asha", "monitor/rankme", "--smoke"], "from step 200 on.* has 12 steps; set --monitor.every-steps to 1"),
        (["--asha", "monitor/rankme", "--monitor.every-steps", "251"], "from step 502 on.* has 500 steps"),
    ],
)  # fmt: skip
def test_a_search_that_cannot_run_is_refused_in_one_line(plan, words, said):
    with pytest.raises(UsageError, match=said) as error:
        plan(*words)
    assert "\n" not in str(error.value)


def test_asha_compares_from_the_second_reading_on(plan):
    asha = plan("--asha", "monitor/loss").asha
    assert (asha.mode, asha.grace_steps, asha.total_steps) == ("min", 200, 500)
    asha.scheduler()


def test_a_random_choice_says_of_how_many(plan):
    for trials, said in (("1", "1, 0 of them done; random chooses 1 of 2 points"),
                         ("9", "2, 0 of them done; random chooses all 2 points")):  # fmt: skip
        assert f"  trials     {said}" in plan_lines(plan("--search", "random", "--trials", trials))


HUGE = ("--runtime.engine", "ray", "--runtime.num-workers", "4", "--runtime.cpus-per-worker", "1000")


def test_a_dry_run_plans_what_this_machine_cannot_run(plan, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UsageError, match=r"runtime.num_workers 4 x 1000 CPU .*need"):
        plan(*HUGE)
    found = plan(*HUGE, "--dry-run")
    lines = plan_lines(found)
    (resources,) = (line for line in lines if line.startswith("  resources"))
    assert "each 4 x 1000 CPU + 1 for data; not here: runtime.num_workers 4 x 1000 CPU" in resources
    here = plan("--dry-run")
    assert found.work == here.work and "training" in here.work  # it does not depend on the machine
    assert "GPU-hours at 1000 TFLOP/s" in found.time and "GPU" not in here.time
    assert any(line.startswith("  trials     2, 0") for line in lines)


def test_a_dry_run_needs_no_gpus(plan, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    words = ("--runtime.engine", "ray", "--runtime.use-gpu", "true")
    with pytest.raises(UsageError, match="runtime.use_gpu True"):
        plan(*words)
    assert "not here: runtime.use_gpu True" in plan(*words, "--dry-run").room.line


def test_the_dial_asks_a_report(tmp_path):
    for words in (["--want-mrr", "0.3"], ["--want", "equivariant"]):
        with pytest.raises(UsageError, match=f"^{words[0]} {words[1]}: asks a report; give --report DIR"):
            _main(define, [*words, "--dry-run", "--output", str(tmp_path / "none")])


@pytest.fixture
def no_store(tmp_path, monkeypatch):
    """A working directory with an empty MLflow store of the default name."""
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db").search_experiments()
    return tmp_path


def test_a_folder_without_trials_is_looked_for_in_mlflow(no_store, monkeypatch):
    (no_store / "iwm_ray").mkdir()
    options = _parser("?").parse(["--report", "iwm_ray"])
    with pytest.raises(
        UsageError, match=r"--report iwm_ray: no trials in that folder .*MLflow: .*mlflow.db"
    ) as error:
        _open_report(options)
    assert "\n" not in str(error.value)
    asked = []
    monkeypatch.setattr("iwm_ray.runtime.tracked.read_report", lambda *words: asked.append(words[0]))
    _open_report(options)
    assert asked == ["iwm_ray"]
    (no_store / "iwm_ray" / "sweep.json").write_text("{}")  # a sweep whose first trial has not begun
    with pytest.raises(UsageError, match="no trials there"):
        _open_report(options)
    assert asked == ["iwm_ray"]


def test_a_store_is_given_by_its_uri(tmp_path):
    file = tmp_path / "kill.db"
    file.touch()
    with pytest.raises(UsageError, match=f"--report {file}: is a file; .*sqlite:///{file}$"):
        _open_report(_parser("?").parse(["--report", str(file)]))


def test_the_folder_of_another_sweep_is_refused(plan, tmp_path):
    found = plan()
    SweepDirectory(tmp_path).plan(found.sweep, found.trials)
    plan()
    options = _parser("?").parse(["--tracking.uri", "none"])
    other = replace(found.sweep, name="other")
    with pytest.raises(
        UsageError, match=f"--output {tmp_path}: holds the sweep 'test', this is 'other'; choose"
    ):
        make_plan(other, SweepDirectory(tmp_path), options)


def test_a_file_is_no_folder(plan, tmp_path):
    file = tmp_path / "README.md"
    file.touch()
    options = _parser("?").parse(["--tracking.uri", "none"])
    for path in (file, file / "deeper"):
        with pytest.raises(UsageError, match=f"--output {path}: {file} is a file.*; choose another --output"):
            make_plan(plan().sweep, SweepDirectory(path), options)


def test_the_folder_of_other_settings_is_refused(plan, tmp_path):
    found = plan("--schedule.steps", "100")
    SweepDirectory(tmp_path).plan(found.sweep, found.trials)
    with pytest.raises(UsageError, match="its trials have schedule.steps 100, these 500"):
        plan()
