import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import iwm_ray
from iwm_ray import driver
from iwm_ray.finetune import main
from iwm_ray.finetuning.experiment import Experiment
from iwm_ray.finetuning.model import weights_hash
from iwm_ray.finetuning.settings import FinetuneConfig
from iwm_ray.trained import Trained

PHOTOS = ["--data.path", "photos_tiny", "--data.test-path", "photos_tiny:test"]
SMALL = ["--steps", "4", "--batch-size", "16", "--data.num-train", "48", "--data.num-test", "30"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The first digits of scikit-learn as folders of PNGs: train and test."""
    root = tmp_path_factory.mktemp("digits")
    found = load_digits()
    for number, (image, label) in enumerate(zip(found.images[:120], found.target[:120], strict=True)):
        folder = root / ("train" if number < 80 else "test") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype(np.uint8)).resize((16, 16)).save(folder / f"{number}.png")
    return str(root / "train"), str(root / "test")


def finetune(*arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


@pytest.fixture(scope="module")
def finetuned(clean_run, tmp_path_factory):
    """A finished predictor finetuning with two seeds."""
    output = tmp_path_factory.mktemp("finetuned") / "out"
    assert finetune(clean_run, *PHOTOS, *SMALL, "--seeds", 0, 1, "--output", output) == 0
    return output


def read(path):
    return json.loads(path.read_text())


def arms(folder):
    return {path.stem: read(path)["result"] for path in (folder / "arms").glob("*.json")}


def test_the_summary_has_both_arms_and_their_difference(finetuned):
    summary = read(finetuned / "summary.json")
    metrics = summary["metrics"]
    prefix = "finetune/photos_tiny"
    for name in ("top1", "top1_random_predictor", "difference"):
        low, mean, high = (metrics[f"{prefix}/{name}{end}"] for end in ("_low", "", "_high"))
        assert low <= mean <= high
    results = arms(finetuned)
    accuracy = {
        start: np.mean([
            np.mean([int(letter) for letter in result["correct"]["photos_tiny"]])
            for name, result in results.items()
            if start in name
        ])
        for start in ("pretrained", "random")
    }  # fmt: skip
    assert metrics[f"{prefix}/top1"] == pytest.approx(accuracy["pretrained"])
    assert metrics[f"{prefix}/top1_random_predictor"] == pytest.approx(accuracy["random"])
    assert metrics[f"{prefix}/difference"] == pytest.approx(accuracy["pretrained"] - accuracy["random"])
    # 30 images chosen of ten classes
    assert 0.1 <= metrics[f"{prefix}/chance"] < 0.5
    assert [row["predictor"] for row in summary["efficiency"]] == ["pretrained", "random"]
    assert all(len(result["correct"]["photos_tiny"]) == 30 for result in results.values())


def test_the_encoder_stays_and_the_control_has_the_same_heads(finetuned, clean_run):
    results = arms(finetuned)
    encoder = weights_hash(Trained.open(clean_run).load().target_encoder)
    assert len(results) == 4
    assert {result["encoder_hash"] for result in results.values()} == {encoder}
    for seed in (0, 1):
        assert len({result["head_hash"] for name, result in results.items() if f"seed{seed}" in name}) == 1
    assert len({result["head_hash"] for result in results.values()}) == 2


def test_finished_arms_are_not_run_again(finetuned, clean_run, capsys):
    before = {path: path.stat().st_mtime_ns for path in (finetuned / "arms").iterdir()}
    summary = read(finetuned / "summary.json")
    assert finetune(clean_run, *PHOTOS, *SMALL, "--seeds", 0, 1, "--output", finetuned) == 0
    assert {path: path.stat().st_mtime_ns for path in (finetuned / "arms").iterdir()} == before
    assert read(finetuned / "summary.json") == summary
    assert "step 4/4" not in capsys.readouterr().out


def test_an_arm_that_is_missing_is_run_again_to_the_same_result(finetuned, clean_run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(finetuned, copy)
    lost = next((copy / "arms").glob("predictor-random-*seed1.json"))
    before = read(lost)["result"]
    lost.unlink()
    assert finetune(clean_run, *PHOTOS, *SMALL, "--seeds", 0, 1, "--output", copy) == 0
    assert read(lost)["result"]["correct"] == before["correct"]
    assert capsys.readouterr().out.count("step 4/4") == 1


def test_the_adapter_is_a_classifier(finetuned, clean_run):
    (folder,) = (finetuned / "adapters").iterdir()
    classifier = iwm_ray.load(folder)
    probabilities = classifier.predict(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert probabilities.shape == (2, 10) and float(probabilities.sum()) == pytest.approx(2)
    assert "astronaut" in classifier.class_names


def test_several_tasks_with_one_predictor(clean_run, digits, tmp_path, capsys):
    output = tmp_path / "out"
    data = [
        "--data.path", "photos=photos_tiny", f"digits={digits[0]}",
        "--data.test-path", "photos=photos_tiny:test", f"digits={digits[1]}", "--data.weights", 3, 1,
    ]  # fmt: skip
    assert finetune(clean_run, *data, *SMALL, "--seeds", 0, "--output", output) == 0
    metrics = read(output / "summary.json")["metrics"]
    for task in ("photos", "digits"):
        assert {f"finetune/{task}/top1", f"finetune/{task}/multitask/top1"} < set(metrics)
        difference = metrics[f"finetune/{task}/multitask/top1"] - metrics[f"finetune/{task}/top1"]
        assert metrics[f"finetune/{task}/multitask/minus_single"] == pytest.approx(difference)
    results = arms(output)
    steps = {name.split("-lr")[0]: result["steps"] for name, result in results.items()}
    assert steps["predictor-pretrained-photos"] == 6 and steps["predictor-pretrained-digits"] == 2
    assert steps["predictor-pretrained-photos+digits"] == 8
    folder = next((output / "adapters").glob("*photos+digits*"))
    assert iwm_ray.load(folder, task="digits").class_names == tuple("0123456789")
    assert "photos/multitask: together minus alone" in capsys.readouterr().out


def test_the_rate_is_chosen_on_held_out_training_images(clean_run, tmp_path):
    output = tmp_path / "out"
    grid = ["--lr-grid", "1e-9", "1e-2", "--steps", 12, "--seeds", 0, "--output", output]
    assert finetune(clean_run, *PHOTOS, *SMALL, *grid) == 0
    results = arms(output)
    chosen = [name for name in results if "choice" in name]
    assert len(chosen) == 4 and len(results) == 6
    assert all(len(results[name]["correct"]["photos_tiny"]) == 5 for name in chosen)  # a tenth of 48
    for row in read(output / "summary.json")["efficiency"]:
        scores = {}
        for lr in ("1e-09", "0.01"):
            choice = results[f"predictor-{row['predictor']}-photos_tiny-lr{lr}-seed0-choice"]
            scores[lr] = choice["correct"]["photos_tiny"].count("1")
        assert f"{row['lr']:g}" == max(scores, key=scores.get)


def test_a_rate_that_diverges_is_named(clean_run, tmp_path, capsys):
    grid = ["--lr-grid", "1e-3", "1e30", "--steps", 12, "--seeds", 0, "--output", tmp_path / "out"]
    assert finetune(clean_run, *PHOTOS, *SMALL, *grid) == 0
    named = [line for line in capsys.readouterr().out.splitlines() if "diverged" in line]
    assert len(named) == 2 and all("lr1e+30-seed0-choice" in line and "--lr 1e+30" in line for line in named)


def test_encoder_and_both_from_augmented_images(clean_run, tmp_path):
    output = tmp_path / "out"
    strong = [
        "--augment.crop-area",
        0.5,
        "--augment.randaugment",
        5,
        "--augment.mixup",
        0.8,
        "--augment.cutmix",
        1,
    ]
    more = ["--tune", "encoder", "both", "--drop-path", 0.1, "--label-smoothing", 0.1, "--seeds", 0]
    assert finetune(clean_run, *PHOTOS, *SMALL, *strong, *more, "--output", output) == 0
    frozen = weights_hash(Trained.open(clean_run).load().target_encoder)
    results = arms(output)
    assert len(results) == 3
    assert all(
        result["inputs"] == "images" and result["encoder_hash"] != frozen for result in results.values()
    )
    parameters = {name.split("-")[0]: result["trained_parameters"] for name, result in results.items()}
    assert parameters["both"] > parameters["encoder"]


def test_figures_join_those_of_the_run(clean_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(clean_run, run)
    assert finetune(run, *PHOTOS, *SMALL, "--seeds", 0) == 0
    (folder,) = (run / "finetune").iterdir()
    assert folder.name.startswith("photos_tiny-")
    measured = read(folder / "summary.json")["metrics"]
    assert measured.items() <= read(run / "summary.json")["metrics"].items()
    assert (folder / "efficiency.png").stat().st_size > 10_000
    assert iwm_ray.load(next((folder / "adapters").iterdir())).tuned.is_frozen
    # The run may move, with everything in it.
    moved = run.rename(tmp_path / "moved")
    assert iwm_ray.load(next((moved / "finetune" / folder.name / "adapters").iterdir())).class_names


def test_an_output_elsewhere_leaves_the_run_alone(finetuned, clean_run):
    assert "finetune/photos_tiny/top1" not in read(clean_run / "summary.json")["metrics"]
    assert not (clean_run / "finetune").exists()


def test_tokens_are_kept_for_the_next_time(clean_run, tmp_path):
    cache = tmp_path / "cache"
    options = [*PHOTOS, *SMALL, "--seeds", 0, "--runtime.cache", cache]
    assert finetune(clean_run, *options, "--output", tmp_path / "one") == 0
    kept = sorted((cache / "features").iterdir())
    assert len(kept) == 2  # training and test images
    assert finetune(clean_run, *options, "--head", "linear", "--output", tmp_path / "two") == 0
    assert sorted((cache / "features").iterdir()) == kept
    flips = ["--augment.flip-probability", 0.5, "--output", tmp_path / "three"]
    assert finetune(clean_run, *options, *flips) == 0
    assert len(list((cache / "features").iterdir())) == 3


@pytest.mark.parametrize(
    "ablation",
    [["--encoder", "context"], ["--action", "random"], ["--target-fraction", "0.25"]],
    ids=lambda words: words[0],
)
def test_ablations_change_the_result_and_nothing_before_it(finetuned, clean_run, tmp_path, ablation):
    output = tmp_path / "out"
    assert finetune(clean_run, *PHOTOS, *SMALL, "--seeds", 0, *ablation, "--output", output) == 0
    before, now = arms(finetuned), arms(output)
    assert len(now) == 2
    for name, result in now.items():
        assert result["loss"] != before[name]["loss"]
        assert result["head_hash"] == before[name]["head_hash"]
    probabilities = iwm_ray.load(next((output / "adapters").iterdir())).predict(
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    )
    assert probabilities.sum(1).tolist() == pytest.approx([1, 1])


def test_a_dry_run_creates_nothing(clean_run, tmp_path, capsys):
    output = tmp_path / "out"
    assert finetune(clean_run, *PHOTOS, *SMALL, "--output", output, "--dry-run") == 0
    assert not output.exists()
    assert "6, 0 of them finished" in capsys.readouterr().out


def test_a_dry_run_says_how_weights_share_out_the_steps(clean_run, digits, tmp_path, capsys):
    data = [
        "--data.path",
        "a=photos_tiny",
        f"b={digits[0]}",
        "--data.test-path",
        "a=photos_tiny:test",
        f"b={digits[1]}",
    ]
    steps = [
        "--steps",
        20,
        "--batch-size",
        16,
        "--data.weights",
        3,
        1,
        "--output",
        tmp_path / "out",
        "--dry-run",
    ]
    assert finetune(clean_run, *data, *steps) == 0
    out = capsys.readouterr().out
    assert "30 steps of 40 by data.weights" in out and "10 steps of 40 by data.weights" in out


def test_a_dry_run_refuses_where_nothing_can_be_written(clean_run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/out")):
        assert finetune(clean_run, *PHOTOS, *SMALL, "--output", output, "--dry-run") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"--output {output}" in error and "not a writable folder" in error


def test_another_finetuning_in_the_same_folder_is_refused(finetuned, clean_run, capsys):
    assert finetune(clean_run, *PHOTOS, *SMALL, "--head", "linear", "--output", finetuned) == 2
    assert "head 'attentive' != 'linear'; choose another --output" in capsys.readouterr().err


def damaged(digits, folder, count):
    """The digits, of which so many of each set are cut short behind a good header; options that name them."""
    for part, source in zip(("train", "test"), digits, strict=True):
        shutil.copytree(source, folder / part)
        for path in sorted((folder / part).rglob("*.png"))[:count]:
            path.write_bytes(path.read_bytes()[:-40])
    return ["--data.path", f"digits={folder / 'train'}", "--data.test-path", folder / "test"]


@pytest.mark.parametrize("gigabytes", [4, 0], ids=["tokens", "images"])
def test_an_undecodable_image_is_counted_and_named(clean_run, digits, tmp_path, capsys, gigabytes):
    output, data = tmp_path / "out", damaged(digits, tmp_path, 1)
    options = [*data, "--steps", 6, "--batch-size", 16, "--seeds", 0, "--output", output]
    options += ["--runtime.token-gigabytes", gigabytes, "--runtime.data-workers", 1]
    assert finetune(clean_run, *options) == 0
    out = capsys.readouterr().out
    for part, count in (("training", 80), ("test", 40)):
        (line,) = (line for line in out.splitlines() if f"{part} images of digits" in line)
        name = "train" if part == "training" else "test"
        bad = sorted((tmp_path / name).rglob("*.png"))[0].relative_to(tmp_path / name)
        assert line.startswith(f"1 of {count} {part} images of digits cannot be decoded, e.g. {bad}: ")
        file = output / "quarantine" / f"digits-{name}.jsonl"
        assert line.endswith(f"all are named in {file}")
        assert json.loads(file.read_text())["row_id"] == str(bad)
    counts = {"training images of digits": 1, "test images of digits": 1}
    assert read(output / "summary.json")["undecodable"] == counts
    assert all(len(result["correct"]["digits"]) == 39 for result in arms(output).values())
    classes = [path.parent.name for path in sorted((tmp_path / "test").rglob("*.png"))[1:]]
    chance = max(map(classes.count, classes)) / 39
    assert read(output / "summary.json")["metrics"]["finetune/digits/chance"] == pytest.approx(chance)


@pytest.mark.parametrize("gigabytes", [4, 0], ids=["tokens", "images"])
def test_too_many_undecodable_images_stop_a_tuning_that_can_go_on(
    clean_run, digits, tmp_path, capsys, gigabytes
):
    output, data = tmp_path / "out", damaged(digits, tmp_path, 3)
    options = [*data, "--steps", 6, "--batch-size", 16, "--seeds", 0, "--output", output]
    options += ["--runtime.token-gigabytes", gigabytes]
    assert finetune(clean_run, *options) == 1
    error = capsys.readouterr().err
    assert "3 of 80 training images of digits cannot be decoded, e.g. " in error
    assert "more than --data.max-bad-fraction 0.001" in error and error.count("\n") == 1
    assert finetune(clean_run, *options, "--data.max-bad-fraction", 0.1) == 0
    assert "3 of 40 test images of digits cannot be decoded" in capsys.readouterr().out


def test_what_was_refused_once_is_refused_again(clean_run, digits, tmp_path, capsys):
    """Also where each arm has been judged by then."""
    data = ["--data.path", f"digits={digits[0]}", *damaged(digits, tmp_path, 3)[2:]]
    options = [*data, "--tune", "encoder", "--steps", 2, "--batch-size", 16, "--seeds", 0]
    for _ in range(2):
        assert finetune(clean_run, *options, "--output", tmp_path / "out") == 1
        error = capsys.readouterr().err
        assert "3 of 40 test images of digits cannot be decoded" in error and error.count("\n") == 1
        assert "--finetune.max-bad-fraction" in error and str(tmp_path / "out/arms") in error
    assert len(arms(tmp_path / "out")) == 1 and not (tmp_path / "out/summary.json").exists()


def test_arms_that_were_judged_on_other_images_are_named(finetuned, clean_run, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(finetuned, output)
    path = min((output / "arms").glob("*-seed0.json"))
    tree = read(path)
    tree["result"]["correct"]["photos_tiny"] = tree["result"]["correct"]["photos_tiny"][1:]
    path.write_text(json.dumps(tree))
    os.utime(path, (1, 1))
    assert finetune(clean_run, *PHOTOS, *SMALL, "--seeds", 0, 1, "--output", output) == 1
    error = capsys.readouterr().err
    assert f"{path}: judged on 29 images" in error and " on 30, " in error and error.count("\n") == 1
    assert f"remove {path.name} there" in error


def test_a_folder_of_several_parts_may_be_filled_in_several_calls(clean_run, tmp_path):
    tree = {"steps": 4, "batch_size": 16, "drop_path": 0.1, "tune": ["predictor", "both"]}
    tree["data"] = {"path": PHOTOS[1:2], "test_path": PHOTOS[3:], "num_train": 48, "num_test": 30}
    output = tmp_path / "out"
    output.mkdir()
    Experiment.open(Trained.open(clean_run), FinetuneConfig.model_validate(tree), output).start()
    asked = [*PHOTOS, *SMALL, "--drop-path", 0.1, "--tune", "predictor", "--dry-run"]
    assert finetune(clean_run, *asked, "--output", output) == 0
    assert finetune(clean_run, *asked, "--output", tmp_path / "other") == 2


def test_a_test_set_that_cannot_be_read_is_named(clean_run, digits, tmp_path, capsys):
    data = ["--data.path", digits[0], *damaged(digits, tmp_path, 40)[2:]]
    assert finetune(clean_run, *data, "--output", tmp_path / "out", "--dry-run") == 2
    error = capsys.readouterr().err
    assert f"--data.test-path {tmp_path / 'test'}: none of 16 images tried can be read, e.g. " in error
    assert ".png: " in error and error.count("\n") == 1


def test_an_encoder_is_told_no_action(clean_run, tmp_path, capsys):
    output = tmp_path / "out"
    asked = ["--tune", "predictor", "encoder", "--action", "random", "--seeds", 0, "--output", output]
    assert finetune(clean_run, *PHOTOS, *SMALL, *asked) == 0
    told = {
        path.parent.name.split("-")[0]: read(path)["action"]
        for path in output.glob("adapters/*/adapter.json")
    }
    assert told == {"predictor": "random", "encoder": "null"}
    metrics = read(output / "summary.json")["metrics"]
    assert {"finetune/photos_tiny/random_action/top1", "finetune/photos_tiny/encoder/top1"} <= set(metrics)
    out = capsys.readouterr().out
    chance = 100 * metrics["finetune/photos_tiny/chance"]
    assert f"photos_tiny: chance {chance:.2f} % (every image of the most frequent class)" in out
    assert "photos_tiny/random_action: pretrained minus random predictor " in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--data.path is missing"]),
        (["--data.path", "photos_tiny"], ["--data.test-path is missing"]),
        ([*PHOTOS, "--tune", "hed"], ["tune 'hed'", "'predictor', 'encoder' or 'both'"]),
        ([*PHOTOS, "--epochs", "0"], ["epochs '0'", "greater than 0"]),
        ([*PHOTOS, "--hed", "linear"], ["--hed", "did you mean '--head'"]),
        (["--data.path", "photos_tiny", "--data.test-path", "photos_tiny"], ["holds the training images"]),
        ([*PHOTOS, "--checkpoint", "7"], ["kept are the steps"]),
        ([*PHOTOS, "--data.weights", "1", "2"], ["data.weights: 2 given for 1"]),
        ([*PHOTOS, "--data.num-train", "1"], ["--data.num-train 1", "2 or more"]),
        ([*PHOTOS, "--drop-path", "0.1"], ["--drop-path 0.1: changes nothing with --tune predictor"]),
        (["--data.path", "/nowhere", "--data.test-path", "photos_tiny"], ["/nowhere"]),
        (
            ["--data.path", "a=photos_tiny", "b=photos_tiny", "--data.test-path", "b=photos_tiny", "a=photos_tiny"],
            ["same order"],
        ),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_2(clean_run, tmp_path, capsys, arguments, words):
    assert finetune(clean_run, "--output", tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "where", [["--runtime.engine", "ray"], ["--runtime.arms", "tune"]], ids=lambda words: words[1]
)
def test_what_is_missing_for_ray_is_one_line_and_exit_2(clean_run, tmp_path, capsys, monkeypatch, where):
    tiny = [*PHOTOS, *SMALL, "--output", tmp_path / "out", *where]
    assert finetune(clean_run, *tiny, "--tracking.uri", "file:///tmp/x") == 2
    assert "file stores" in capsys.readouterr().err
    find = driver.importlib.util.find_spec
    monkeypatch.setattr(
        driver.importlib.util, "find_spec", lambda name: None if name == "ray" else find(name)
    )
    assert finetune(clean_run, *tiny) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "ray is not installed" in error and where[1] in error
    assert not (tmp_path / "out").exists()


def test_images_without_classes(clean_run, digits, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in sorted(Path(digits[0]).rglob("*.png"))[:4]:
        shutil.copy(path, flat)
    assert finetune(clean_run, "--data.path", flat, "--data.test-path", digits[1]) == 2
    assert "no labels; give a folder with one folder for each class, or a Parquet" in capsys.readouterr().err


def test_classes_that_do_not_meet(clean_run, digits, tmp_path, capsys):
    arguments = ["--data.path", "photos_tiny", "--data.test-path", digits[1], "--output", tmp_path / "out"]
    assert finetune(clean_run, *arguments) == 2
    assert "class 0 is not among the training images; give test images of" in capsys.readouterr().err


def test_test_images_that_are_trained_on(clean_run, digits, tmp_path, capsys):
    """One of two Parquet files of the training set is the test set."""
    for name, folder in zip(("a", "b"), digits, strict=True):
        files = sorted(Path(folder).rglob("*.png"))
        columns = {
            "image": [each.read_bytes() for each in files],
            "label": [each.parent.name for each in files],
        }
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    output = ["--output", tmp_path / "out", "--dry-run"]
    test = ["--data.test-path", tmp_path / "b.parquet", *output]
    assert finetune(clean_run, "--data.path", tmp_path, *test) == 2
    assert "40 of 40 images are training images too, such as b.parquet:" in capsys.readouterr().err
    assert finetune(clean_run, "--data.path", tmp_path / "a.parquet", *test) == 0
    crossed = [
        f"{task}={tmp_path / file}.parquet" for task, file in (("x", "a"), ("y", "b"), ("x", "b"), ("y", "a"))
    ]
    sets = ["--data.path", *crossed[:2], "--data.test-path", *crossed[2:], *output]
    assert finetune(clean_run, *sets) == 2
    assert "b.parquet: holds the training images" in capsys.readouterr().err


def test_a_folder_that_is_no_run(tmp_path, capsys):
    assert finetune(tmp_path, *PHOTOS) == 2
    assert "no config.json" in capsys.readouterr().err


def test_arms_can_do_without_runs_of_their_own_in_mlflow(clean_run, tmp_path):
    from mlflow.tracking import MlflowClient

    run, store = tmp_path / "run", f"sqlite:///{tmp_path / 'mlflow.db'}"
    shutil.copytree(clean_run, run)
    options = ["--seeds", 0, "--tracking.uri", store, "--tracking.arms", "false"]
    assert finetune(run, *PHOTOS, *SMALL, *options) == 0
    client = MlflowClient(tracking_uri=store)
    experiments = [each.experiment_id for each in client.search_experiments()]
    (alone,) = client.search_runs(experiments)
    assert "finetune/photos_tiny/top1" in alone.data.metrics


def test_arms_are_children_of_the_run_in_mlflow(clean_run, tmp_path):
    from mlflow.tracking import MlflowClient

    run = tmp_path / "run"
    shutil.copytree(clean_run, run)
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert finetune(run, *PHOTOS, *SMALL, "--seeds", 0, "--tracking.uri", store) == 0
    client = MlflowClient(tracking_uri=store)
    (experiment,) = (each for each in client.search_experiments() if each.name == "iwm_ray")
    runs = {each.info.run_name: each for each in client.search_runs([experiment.experiment_id])}
    parent = runs.pop("run")
    assert len(runs) == 2 and "finetune/photos_tiny/top1" in parent.data.metrics
    for name, child in runs.items():
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.data.params["arm"] in name and child.data.params["batch_size"] == "16"
        assert {"train/loss", "train/lr"} <= set(child.data.metrics) and child.info.status == "FINISHED"
        suffix = "_random_predictor" if "random" in name else ""
        # Of one seed the figure of the family is that of its arm.
        figure = f"finetune/photos_tiny/top1{suffix}"
        assert child.data.metrics[figure] == parent.data.metrics[figure]
    assert parent.data.params["optimizer.global_batch_size"] == "32"
    (folder,) = (run / "finetune").iterdir()
    assert parent.data.tags["iwm.finetune.photos_tiny"] == folder.name
    kept = {each.path for each in client.list_artifacts(parent.info.run_id, f"finetune/{folder.name}")}
    names = ("config.json", "summary.json", "efficiency.png")
    assert kept == {f"finetune/{folder.name}/{name}" for name in names}
    # What is done in another way has another name.
    assert finetune(run, *PHOTOS, *SMALL, "--seeds", 0, "--head", "linear", "--tracking.uri", store) == 0
    found = client.get_run(parent.info.run_id).data
    assert found.metrics["finetune/photos_tiny/top1"] == parent.data.metrics["finetune/photos_tiny/top1"]
    assert "finetune/photos_tiny/linear_head/top1" in found.metrics
    assert found.tags["iwm.finetune.photos_tiny"] == folder.name
    assert found.tags["iwm.finetune.photos_tiny.linear_head"] != folder.name
