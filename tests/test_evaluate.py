"""The evaluation of a tiny run, as its user sees it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from iwm_ray.errors import RunError
from iwm_ray.evaluate import main
from iwm_ray.trained import Trained
from iwm_ray.training import metrics_log

SMALL = {
    "--measure.images": 6,
    "--measure.views": 8,
    "--measure.targets": 4,
    "--measure.train-images": 90,
    "--measure.test-images": 60,
    "--tracking.uri": "none",
}


@pytest.fixture
def run(clean_run, tmp_path):
    """A copy of the tiny run, to write into."""
    return shutil.copytree(clean_run, tmp_path / "run")


@pytest.fixture
def evaluate(capsys):
    """`evaluate(run, *words, options)`: exit code and what was printed."""

    def call(run, *words, **changes):
        options = SMALL | {
            f"--{name.replace('__', '.').replace('_', '-')}": value for name, value in changes.items()
        }
        arguments = [str(run), *words, *(str(word) for option in options.items() for word in option)]
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        return ended.value.code, capsys.readouterr()

    return call


def results(run):
    return {path.stem: json.loads(path.read_text()) for path in run.glob("evaluation/*/*.json")}


def test_world_model_and_representation_are_measured_beside_untrained_weights(run, evaluate):
    code, said = evaluate(run, "--tasks", "mrr", "rank", "knn", "linear")
    assert code == 0, said.err
    found = results(run)
    assert set(found) == {"mrr", "rank", "knn", "linear"}
    for result in found.values():
        assert set(result["measured"]) == {"trained", "untrained"}
    trained = found["mrr"]["measured"]["trained"]
    assert trained["mrr/mrr_low"] <= trained["mrr/mrr"] <= trained["mrr/mrr_high"]
    assert trained["mrr/chance"] == pytest.approx(sum(1 / rank for rank in range(1, 9)) / 8)
    assert {"mrr/inverse", "mrr/hue"} <= set(trained)
    ranks = pyarrow.parquet.read_table(next(run.glob("evaluation/*/mrr-trained.parquet")))
    assert ranks.num_rows == 6 * 4
    assert len(set(ranks["row_id"].to_pylist())) == 6
    assert trained["mrr/mrr"] == pytest.approx(np.mean(1 / ranks["rank"].to_numpy()))
    heads = pyarrow.parquet.read_table(next(run.glob("evaluation/*/linear-heads.parquet")))
    assert set(heads["encoder"].to_pylist()) == {"trained", "untrained"}
    assert "MRR" in said.out
    assert "linear probe" in said.out


def test_untrained_weights_may_be_left_out(run, evaluate):
    """The other figures are the same; and a result without them is none for a command that wants them."""
    assert evaluate(run, "--tasks", "mrr", "linear", measure__untrained="false")[0] == 0
    alone = results(run)
    assert {tuple(result["measured"]) for result in alone.values()} == {("trained",)}
    assert evaluate(run, "--tasks", "mrr", "linear")[0] == 0
    for name, result in results(run).items():
        assert set(result["measured"]) == {"trained", "untrained"}
        assert result["measured"]["trained"] == alone[name]["measured"]["trained"]


def test_actions_and_errors_are_measured(run, evaluate):
    code, said = evaluate(run, "--tasks", "action_r2", "error", measure__images=20)
    assert code == 0, said.err
    found = results(run)
    for subject in ("trained", "untrained"):
        figures = found["action_r2"]["measured"][subject]
        assert {"action_r2/mean", "action_r2/hue", "action_r2/blur", "rank/lidar"} <= set(figures)
        assert figures["action_r2/mean_low"] <= figures["action_r2/mean"] <= figures["action_r2/mean_high"]
        errors = pyarrow.parquet.read_table(
            next(run.glob(f"evaluation/*/error-{subject}.parquet"))
        ).to_pandas()
        hue = errors[(errors["component"] == "hue") & (errors["distance"] > 0)]
        share = found["error"]["measured"][subject]["error/hue"]
        assert share == pytest.approx(hue["error"].sum() / hue["null_error"].sum())


def test_expected_tokens_are_probed(run, evaluate):
    code, said = evaluate(run, "--tasks", "marginal")
    assert code == 0, said.err
    for figures in results(run)["marginal"]["measured"].values():
        assert figures["marginal/top1_low"] <= figures["marginal/top1"] <= figures["marginal/top1_high"]
    assert "linear probe on expected tokens" in said.out


def test_the_figures_become_the_runs_own(run, evaluate):
    evaluate(run, "--tasks", "mrr")
    trained = results(run)["mrr"]["measured"]["trained"]
    newest = {name: value for row in metrics_log.read(run / "metrics.jsonl") for name, value in row.items()}
    assert newest["mrr/mrr"] == trained["mrr/mrr"]
    assert json.loads((run / "summary.json").read_text())["metrics"]["mrr/mrr"] == trained["mrr/mrr"]
    before = (run / "metrics.jsonl").read_bytes()
    evaluate(run, "--tasks", "mrr")
    assert (run / "metrics.jsonl").read_bytes() == before


def test_what_is_there_is_not_measured_again(run, evaluate):
    evaluate(run, "--tasks", "mrr", "knn")
    before = results(run)
    evaluate(run, "--tasks", "mrr", "knn")
    assert results(run) == before  # with the seconds that it took
    evaluate(run, "--tasks", "mrr", "knn", measure__num_neighbors=3)
    assert results(run)["mrr"] == before["mrr"]
    assert results(run)["knn"]["key"] != before["knn"]["key"]


def test_the_files_reach_mlflow(run, evaluate, tmp_path):
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    code, said = evaluate(run, "--tasks", "mrr", tracking__uri=uri)
    assert code == 0, said.err
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("iwm_ray")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.data.metrics["mrr/mrr"] == results(run)["mrr"]["measured"]["trained"]["mrr/mrr"]
    (folder,) = client.list_artifacts(found.info.run_id, "evaluation")
    assert any(
        file.path.endswith("mrr.json") for file in client.list_artifacts(found.info.run_id, folder.path)
    )


def test_a_dry_run_measures_nothing(run, evaluate):
    code, said = evaluate(run, "--dry-run", measure__images=12)
    assert code == 0
    assert "plan of" in said.out
    assert not (run / "evaluation").exists()


def test_other_encoders_stand_beside(run, evaluate):
    code, said = evaluate(run, "--tasks", "knn", measure__encoders="resnet10t")
    assert code == 0, said.err
    assert "resnet10t" in results(run)["knn"]["measured"]


def test_cheap_results_stand_apart(run, evaluate):
    code, said = evaluate(run, "--cheap", "--tasks", "rank")
    assert code == 0, said.err
    assert next(run.glob("evaluation/*-cheap/rank.json"))


def test_cheap_figures_and_those_of_other_data_do_not_become_the_runs_own(run, evaluate, photo_cache):
    before = (run / "metrics.jsonl").read_bytes()
    evaluate(run, "--cheap", "--tasks", "mrr")
    path = json.loads((run / "config.json").read_text())["data"]["path"]
    found = next(photo_cache.rglob("train")) if path == "photos_tiny" else path
    code, said = evaluate(run, "--tasks", "knn", data__path=found)
    assert code == 0, said.err
    assert "a random fifth of the training images" in said.out
    assert (run / "metrics.jsonl").read_bytes() == before
    assert len(list((run / "evaluation").iterdir())) == 2


def test_goodput_is_that_of_the_training(run, evaluate, tiny_command, capsys):
    before = json.loads((run / "summary.json").read_text())["goodput"]
    evaluate(run, "--tasks", "rank")
    assert json.loads((run / "summary.json").read_text())["goodput"] == before


def test_unlabelled_images_are_noticed_before_anything_is_measured(run, evaluate, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    import cv2

    for number in range(40):
        image = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        cv2.imwrite(str(folder / f"{number}.png"), image)
    code, printed = evaluate(run, data__path=folder, measure__images=12)
    assert code == 2
    assert "no image has a label" in printed.err


def test_images_that_cannot_be_used_are_noticed_before_anything_is_measured(run, evaluate, tmp_path):
    import cv2

    def photos(name: str, classes: int, size: int) -> Path:
        for number in range(classes):
            folder = tmp_path / name / f"class {number}"
            folder.mkdir(parents=True)
            image = np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8)
            cv2.imwrite(str(folder / "0.png"), image)
        return tmp_path / name

    code, printed = evaluate(run, "--tasks", "knn", data__path=photos("tiny", 6, 4))
    assert code == 2
    assert (
        "none of 6 images tried can be read, e.g. class " in printed.err
        and "0.png: 4x4 pixels" in printed.err
    )
    code, printed = evaluate(run, "--tasks", "knn", data__path=photos("few", 6, 32))
    assert code == 2
    assert "one image in 5 of each class is held out" in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert not (run / "evaluation").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--checkpoint", "7"), "kept are the steps"),
        (("--tasks", "mrs"), "measure.tasks 'mrs'"),
        (("--measure.encoders", "resnet10x"), "timm has no such model"),
        (("--measure.layers", "99", "--measure.images", "10"), "the encoder has layers 0 to 1"),
        (("--tasks", "action_r2"), "action_r2 needs 10"),
        (("--data.path", "/nowhere"), "/nowhere"),
        (("--measure.imagse", "3"), "unknown argument '--measure.imagse'; did you mean '--measure.images'"),
    ],
)
def test_mistakes_are_answered_in_one_line(run, evaluate, words, said):
    code, printed = evaluate(run, *words)
    assert code == 2
    assert said in printed.err
    assert len(printed.err.strip().splitlines()) == 1


def test_a_folder_that_is_no_run(tmp_path, evaluate):
    code, printed = evaluate(tmp_path)
    assert code == 2
    assert "no config.json" in printed.err


def test_test_images_among_the_training_images_are_refused(run, evaluate, tmp_path):
    data = tmp_path / "data"
    for number in range(4):
        path = data / "val" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (60 * number, 0, 0)).save(path)
    code, said = evaluate(run, "--tasks", "mrr", data__path=data, data__test_path=data / "val")
    assert code == 2
    assert "lies in path" in said.err


def test_a_class_that_only_the_test_images_have_is_refused_before_anything_is_measured(
    run, evaluate, tmp_path
):
    for part, names in (("train", "ab"), ("test", "abc")):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (40, 40), (ord(name), 0, len(part))).save(tmp_path / part / name / "x.png")
    code, said = evaluate(
        run, "--tasks", "rank", "knn", data__path=tmp_path / "train", data__test_path=tmp_path / "test"
    )
    assert code == 2
    assert "class c" in said.err
    assert not results(run)


def test_a_checkpoint_that_the_run_has_replaced_is_named(run):
    trained = Trained.open(run)
    shutil.rmtree(trained.path)
    with pytest.raises(RunError, match="replaced by a newer one"):
        trained.load()


def test_a_reader_that_has_seen_enough_is_no_error(run):
    command = f"{sys.executable} -m iwm_ray.evaluate {run} --dry-run | true; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert ended.stdout.strip() in ("0", "1")
    assert "Traceback" not in ended.stderr
    assert "BrokenPipe" not in ended.stderr
