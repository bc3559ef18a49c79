"""A masked autoencoder as a run of the same code: what works for it, and what is refused in plain words."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import iwm_ray
from iwm_ray import action_log, evaluate, export, finetune, pretrain, replay, visualize
from iwm_ray.finetuning.model import Asking, weights_hash
from iwm_ray.trained import Trained

MAE = {
    "--runtime.engine": "local",
    "--predictor.target": "pixels",
    "--predictor.conditioning": "none",
    "--masks.style": "random",
    "--schedule.steps": 6,
    "--runtime.checkpoint-every-steps": 3,
    **{f"--views.{name}-probability": 0 for name in ("jitter", "grayscale", "blur", "solarize")},
}
PHOTOS = ["--data.path", "photos_tiny", "--data.test-path", "photos_tiny:test"]


def call(main, *arguments):
    """The exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


@pytest.fixture(scope="module")
def mae_run(tiny_command, tmp_path_factory):
    output = tmp_path_factory.mktemp("mae") / "run"
    assert call(pretrain.main, *tiny_command(output, MAE)) == 0
    return output


@pytest.fixture
def copy(mae_run, tmp_path):
    return shutil.copytree(mae_run, tmp_path / "run")


def test_the_run_ends_with_its_features_measured_and_no_figure_of_an_action(mae_run):
    summary = json.loads((mae_run / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert {"monitor/loss", "monitor/rankme", "knn/top1"} <= set(summary["metrics"])
    wrong = [
        name for name in summary["metrics"] if name.startswith("mrr") or "cosine" in name or "gap" in name
    ]
    assert not wrong
    assert "invariant" not in summary["health_line"]
    assert not (mae_run / "pictures" / "retrieval.png").exists()


def test_it_learns_pixels_and_moves_both_encoders(mae_run):
    trained = Trained.open(mae_run)
    model, start = trained.load(), trained.untrained()
    assert model.predictor.unembed.out_features == 3 * 8 * 8
    hashes = [weights_hash(part) for part in (model.encoder, model.target_encoder, start.encoder)]
    assert len(set(hashes)) == 3
    rows = [json.loads(line) for line in (mae_run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["monitor/loss"] for row in rows if "monitor/loss" in row]
    assert losses[-1] < losses[0]


def test_an_interrupted_run_ends_with_the_same_bits(mae_run, tiny_command, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(mae_run, part)
    shutil.rmtree(part / "checkpoints" / "step_00000006")
    (part / "summary.json").unlink()
    assert call(pretrain.main, *tiny_command(part, MAE)) == 0
    one, other = (
        load_file(run / "checkpoints" / "step_00000006" / "model.safetensors") for run in (mae_run, part)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_logged_row_is_rebuilt_with_its_mask(mae_run, capsys):
    row = action_log.read(mae_run / "actions", 0).slice(2, 1).to_pylist()[0]
    blocks = [tuple(block) for block in row["mask_blocks"]]
    assert len(set(blocks)) == 12 and {block[2:] for block in blocks} == {(1, 1)}
    assert call(replay.main, mae_run, "--epoch", 0, "--row", row["row_id"]) == 0
    assert "rebuilt bit for bit" in capsys.readouterr().out


def test_the_encoder_is_measured_and_the_world_model_is_refused(copy, capsys):
    small = ["--measure.train-images", 60, "--measure.test-images", 40, "--tracking.uri", "none"]
    assert call(evaluate.main, copy, "--tasks", "knn", "linear", *small) == 0
    found = json.loads((copy / "summary.json").read_text())["metrics"]
    assert {"knn/top1", "linear/top1"} <= set(found)
    capsys.readouterr()
    for tasks in (["mrr", "knn"], ["marginal"], ["action_r2", "error"]):
        assert call(evaluate.main, copy, "--tasks", *tasks, *small) == 2
        said = capsys.readouterr().err.strip()
        assert "predicts pixels (MAE)" in said and "knn" in said and "\n" not in said


def test_its_decoder_is_finetuned_beside_its_control(mae_run, tmp_path):
    output = tmp_path / "out"
    few = ["--steps", 2, "--batch-size", 16, "--data.num-train", 32, "--data.num-test", 20, "--seeds", 0]
    assert call(finetune.main, mae_run, *PHOTOS, *few, "--output", output) == 0
    metrics = json.loads((output / "summary.json").read_text())["metrics"]
    assert {"finetune/photos_tiny/top1", "finetune/photos_tiny/difference"} <= set(metrics)
    (folder,) = (output / "adapters").iterdir()
    classifier, trained = iwm_ray.load(folder), Trained.open(mae_run)
    pictures = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    tokens = classifier.tuned.represent(
        pictures, "photos_tiny", Asking(trained.policy, 16).query(2, 0, 0, torch.device("cpu"))
    )
    assert tokens.shape == (2, 16, 64)  # the encoder's width, not 3 x 8 x 8 pixels
    assert classifier.predict(pictures).shape == (2, 10)


def test_it_is_drawn_without_what_it_cannot_imagine(copy, capsys):
    assert call(visualize.main, copy, "--output", copy / "drawn", "--tracking.uri", "none") == 0
    assert {path.name for path in (copy / "drawn").iterdir()} == {"views.png", "curves.png", "index.html"}
    assert "predicts pixels (MAE)" in capsys.readouterr().out


def test_its_encoder_is_exported(mae_run, tmp_path):
    assert call(export.main, mae_run, "--format", "timm", "--output", tmp_path / "timm") == 0
    assert (tmp_path / "timm" / "model.safetensors").exists()
