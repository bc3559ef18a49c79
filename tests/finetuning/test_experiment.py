import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from iwm_ray.errors import RunError, UsageError
from iwm_ray.finetuning.arms import Arm, ArmResult
from iwm_ray.finetuning.experiment import Experiment
from iwm_ray.finetuning.model import weights_hash
from iwm_ray.finetuning.settings import FinetuneConfig
from iwm_ray.finetuning.summary import lines, summarise
from iwm_ray.finetuning.tuning import ArmTraining, work
from iwm_ray.training import metrics_log
from iwm_ray.workers import train_here


@pytest.fixture
def experiment(trained, config, tmp_path):
    return Experiment.open(trained, config.model_copy(update={"steps": 2, "seeds": (0,)}), tmp_path / "out")


def here(experiment):
    """Trains arms in this process, without any runtime."""

    def train(arms):
        outcomes = []
        for arm in arms:
            training = ArmTraining(experiment, arm)
            training.run.path.mkdir(parents=True, exist_ok=True)
            outcomes.append(train_here(training, work))
        return all(outcome.status == "finished" for outcome in outcomes)

    return train


def test_it_runs_without_any_runtime(experiment, model):
    assert experiment.run(here(experiment))
    results = experiment.results()
    assert [arm.start for arm in results] == ["pretrained", "random"]
    assert {result.encoder_hash for result in results.values()} == {weights_hash(model.target_encoder)}
    assert all(experiment.finished(arm) == result for arm, result in results.items())
    for arm in results:
        rows = metrics_log.read(ArmTraining(experiment, arm).run.metrics)
        assert [row["step"] for row in rows] == [2] and rows[0]["train/loss"] == results[arm].loss
        assert not ArmTraining(experiment, arm).run.checkpoints.exists()
    assert experiment.run(lambda arms: pytest.fail(f"{arms} again")) and experiment.results() == results


def test_an_arm_whose_adapter_is_missing_is_not_finished(experiment):
    experiment.run(here(experiment))
    ours, control = results = experiment.results()
    shutil.rmtree(experiment.adapter(ours))
    assert experiment.finished(ours) is None and experiment.finished(control) == results[control]
    experiment.run(here(experiment))
    assert experiment.results()[ours].correct == results[ours].correct and experiment.finished(ours)


def test_a_seed_that_is_added_brings_no_other_adapter(trained, config, tmp_path):
    """And is not in the way of those that are there: which seed is asked for first has no part in it."""

    def asked(*seeds):
        return Experiment.open(
            trained, config.model_copy(update={"steps": 2, "seeds": seeds}), tmp_path / "out"
        )

    first = asked(0, 1)
    first.run(here(first))
    for other in (asked(1), asked(1, 0)):
        assert other.run(lambda arms: pytest.fail(f"{arms} again"))
    asked(2).run(here(asked(2)))
    assert [folder.name[-5:] for folder in (tmp_path / "out" / "adapters").iterdir()] == ["seed0"]
    assert len(first.results()) == 6


def test_a_rate_that_diverges_is_not_chosen(trained, config, tmp_path):
    grid = config.model_copy(update={"steps": 12, "seeds": (0,), "lr_grid": (1e-3, 1e30)})
    experiment = Experiment.open(trained, grid, tmp_path / "out")
    assert experiment.run(here(experiment))
    assert [experiment.diverged(arm).exists() for arm in experiment.candidates()] == [False, True] * 2
    assert "at --lr 1e+30" in experiment.diverged(experiment.candidates()[1]).read_text()
    assert {arm.lr for arm in experiment.results()} == {1e-3} and len(experiment.results()) == 2
    assert experiment.run(lambda arms: pytest.fail(f"{arms} again"))


def test_where_every_rate_diverges_it_ends(trained, config, tmp_path):
    grid = config.model_copy(update={"steps": 12, "seeds": (0,), "lr_grid": (1e30, 1e29)})
    experiment = Experiment.open(trained, grid, tmp_path / "out")
    with pytest.raises(
        RunError, match=r"--lr-grid 1e\+30 1e\+29: the loss of predictor, pretrained predictor, .* lower"
    ):
        experiment.run(here(experiment))
    assert experiment.results() == {}


def test_a_damaged_record_is_one_line(experiment):
    experiment.folder.mkdir()
    (experiment.folder / "config.json").write_text('{"name": "a')
    with pytest.raises(RunError, match=r"config.json: damaged .* another --output"):
        experiment.check_folder()


def test_an_action_is_refused_where_the_predictor_has_none(trained, config, tmp_path):
    run = trained.config.model_copy(
        update={"predictor": trained.config.predictor.model_copy(update={"conditioning": "none"})}
    )
    without, random = replace(trained, config=run), config.model_copy(update={"action": "random"})
    with pytest.raises(UsageError, match=r"--action random: .*predictor.conditioning none"):
        Experiment.open(without, random, tmp_path / "out")
    Experiment.open(without, config, tmp_path / "out")
    Experiment.open(trained, random, tmp_path / "out")


def test_the_test_images_choose_nothing(experiment, task):
    """A choosing arm trains on and is judged on disjoint training images; the final one trains on all of them."""
    choice = Arm("predictor", "random", ("photos_tiny",), 0, 1e-3, is_choice=True)
    for cached in (False, True):
        gigabytes = {"token_gigabytes": 4.0 if cached else 0.0}
        runtime = experiment.config.runtime.model_copy(update=gigabytes)
        asked = replace(experiment, config=experiment.config.model_copy(update={"runtime": runtime}))
        assert asked.has_tokens(choice) == cached
        (train,), (judged,) = asked._splits(choice)
        (whole,), (test,) = asked._splits(replace(choice, is_choice=False))
        seen, held, all_of_them, tested = (
            set(rows.samples.tolist()) for rows in (train, judged, whole, test)
        )
        assert not seen & held and seen | held == all_of_them == set(task.train.samples.tolist())
        assert len(held) == 4 and tested == set(task.test.samples.tolist())


def test_tokens_carry_the_labels_of_the_task(experiment, task):
    (_,), (test,) = experiment._splits(Arm("predictor", "random", ("photos_tiny",), 0, 1e-3))
    assert np.array_equal(test.labels, task.test.labels)
    assert np.array_equal(test.samples, task.test.samples)


def test_another_choice_of_images_has_its_own_tokens(experiment, task):
    """Of one data set as many images, but others."""
    first, second = (experiment._features(task.train.part(*part), False) for part in ((0, 10), (10, 20)))
    assert first.samples.tolist() == task.train.samples[:10].tolist()
    assert second.samples.tolist() == task.train.samples[10:20].tolist()


@pytest.mark.parametrize(
    ("changes", "steps"),
    [({"steps": 7}, 7), ({"epochs": 3.0}, 6), ({"epochs": 0.1}, 1), ({"batch_size": 1000, "epochs": 5.0}, 5)],
)
def test_steps_come_from_epochs(trained, config, tmp_path, changes, steps):
    found = Experiment.open(trained, config.model_copy(update=changes), tmp_path)  # 40 images
    assert found.num_steps(("photos_tiny",)) == [steps]


def test_tokens_that_would_not_fit_are_made_at_every_step(trained, config, tmp_path):
    runtime = config.runtime.model_copy(update={"token_gigabytes": 1e-6})
    found = Experiment.open(trained, config.model_copy(update={"runtime": runtime}), tmp_path)
    assert not found._keeps_tokens()
    assert Experiment.open(trained, config, tmp_path)._keeps_tokens()


def test_the_folder_is_named_by_what_decides_the_results(trained, config):
    def name(**changes):
        return Experiment.open(trained, FinetuneConfig(**(config.model_dump() | changes)), None).folder

    assert name() == name(seeds=(5,)) == name(tune=("both",)) == name(lr_grid=(1e-3,))
    others = [name(head="linear"), name(lr=1e-2), name(lr_grid=(1e-3, 1e-2)), name(epochs=1)]
    assert len({name(), *others}) == 5
    assert name().parent == trained.run.path / "finetune"


def test_other_images_of_the_same_names_and_sizes_have_another_folder(trained, config, task, tmp_path):
    data = tmp_path / "data"
    names = []
    for value in (1, 2):
        for part, count in (("train", 4), ("test", 3)):
            for number in range(count):
                path = data / part / str(number % 2) / f"{number}.bmp"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.full((16, 16, 3), value + number, np.uint8)
                Image.fromarray(pixels).save(path.with_suffix(".png"), compress_level=0)
        paths = {"path": (str(data / "train"),), "test_path": (str(data / "test"),)}
        asked = config.model_copy(update={"data": config.data.model_copy(update=paths), "batch_size": 2})
        names.append(Experiment.open(trained, asked, None).folder.name)
    assert names[0] != names[1]


def test_a_folder_holds_what_is_true_of_all_its_arms(trained, config, tmp_path):
    """Whatever the last call was about: the first one's settings and figures stay beside it."""
    asked = config.model_copy(update={"steps": 1, "seeds": (0, 1)})
    first = Experiment.open(trained, asked, tmp_path / "out")
    first.folder.mkdir()
    first.start()
    first.run(here(first))
    recorded = (first.folder / "config.json").read_text()
    whole = summarise(first.results(), first.tasks)["metrics"]
    more = Experiment.open(
        trained, asked.model_copy(update={"seeds": (2,), "tune": ("encoder",)}), first.folder
    )
    more.start()
    more.run(here(more))
    assert (first.folder / "config.json").read_text() == recorded and "seeds" not in json.loads(recorded)
    found = summarise(more.results(), more.tasks)
    assert whole.items() <= found["metrics"].items()
    assert [(row["tune"], row["seeds"]) for row in found["efficiency"]] == [
        ("predictor", [0, 1]),
        ("predictor", [0, 1]),
        ("encoder", [2]),
    ]
    for arm, result in more.results().items():
        own = json.loads((first.folder / "arms" / f"{arm.name}.json").read_text())
        assert own["settings"]["lr"] == arm.lr and own["settings"]["steps"] == 1
        (figure,) = (value for name, value in own["figures"].items() if not name.endswith(("_low", "_high")))
        assert figure == result.rights("photos_tiny").mean()


def test_a_difference_is_of_the_seeds_that_both_have():
    def arm(start, seed, correct):
        result = ArmResult({"a": correct}, 1, 1, 0.0, 1, 1.0, 1, "tokens", "", "")
        return Arm("predictor", start, ("a",), seed, 1.0), result

    results = dict([arm("pretrained", 0, "1100"), arm("pretrained", 1, "0000"), arm("random", 0, "1000")])
    summary = summarise(results, {}, ("linear_head",))
    metrics = summary["metrics"]
    assert metrics["finetune/a/linear_head/top1"] == 0.25
    assert metrics["finetune/a/linear_head/difference"] == 0.25
    assert summary["num_seeds"] == {
        "finetune/a/linear_head/top1": 2,
        "finetune/a/linear_head/difference": 1,
        "finetune/a/linear_head/top1_random_predictor": 1,
    }
    head, pretrained, control, note, _, difference = lines(summary)
    assert "std" in head and pretrained[head.index("std") :].startswith("35.36")
    assert control[head.index("std") :].startswith("- ")
    assert note == "std -: one seed, 95 % over test images alone"
    assert "+25.00 points (95 %, over test images, one seed: " in difference
