import json

import numpy as np
import pytest
import timm
import torch
from PIL import ExifTags, Image

from iwm_ray import exporting
from iwm_ray.data.index import Index
from iwm_ray.export import main
from iwm_ray.finetuning import adapter
from iwm_ray.trained import Trained

LIBRARIES = {"timm": "timm", "hf": "transformers", "onnx": "onnxruntime", "torch-export": "torch"}
PICTURE = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)
READERS = {
    "timm": exporting.read_timm,
    "hf": exporting.read_hf,
    "onnx": exporting.read_onnx,
    "torch-export": exporting.read_torch,
}


def run_card(folder, monkeypatch):
    """What the card's code makes of a photograph that lies on its side, pasted as it stands."""
    lying = Image.Exif()
    lying[ExifTags.Base.Orientation] = 6
    Image.fromarray(PICTURE).resize((400, 320)).save(folder / "photo.jpg", exif=lying)
    monkeypatch.chdir(folder)
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(code, names)
    return names


def export(*arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


@pytest.fixture(scope="module")
def adapters(clean_run, tmp_path_factory):
    """Folders of adapters: of a predictor, and of an encoder."""
    from iwm_ray.finetune import main as finetune

    output = tmp_path_factory.mktemp("tuned") / "out"
    words = "--data.path photos_tiny --data.test-path photos_tiny:test --steps 2 --batch-size 8 --data.num-train 16"
    more = f"--data.num-test 20 --seeds 0 --tune predictor encoder --output {output}"
    with pytest.raises(SystemExit) as ended:
        finetune([str(clean_run), *words.split(), *more.split()])
    assert ended.value.code == 0
    return {path.name.split("-")[0]: path for path in (output / "adapters").iterdir()}


@pytest.mark.parametrize("format", LIBRARIES)
def test_each_library_reads_the_same_tokens(clean_run, tmp_path, capsys, monkeypatch, format):
    pytest.importorskip(LIBRARIES[format])
    output = tmp_path / "deep" / "out"
    assert export(clean_run, "--format", format, "--output", output) == 0
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    encoder = Trained.open(clean_run).load().target_encoder.eval()
    with torch.no_grad():
        torch.testing.assert_close(READERS[format](output)(images), encoder(images), atol=1e-4, rtol=1e-4)
    assert f"exported     {output}" in capsys.readouterr().out
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    assert run_card(output, monkeypatch)["output"].shape == (1, 16, encoder.width)


def test_timm_s_own_transform_prepares_images(clean_run, tmp_path):
    assert export(clean_run, "--format", "timm", "--encoder", "context", "--output", tmp_path / "out") == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        found = model.forward_features(transform(Image.fromarray(pixels.numpy()))[None])
        expected = Trained.open(clean_run).load().encoder.eval()(pixels.permute(2, 0, 1)[None])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["predictor", "encoder"])
@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_a_classifier_gives_its_probabilities(adapters, tmp_path, capsys, monkeypatch, format, kind):
    pytest.importorskip(LIBRARIES[format])
    assert export(adapters[kind], "--format", format, "--output", tmp_path / "out") == 0
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    classifier = adapter.load(adapters[kind])
    expected = classifier.predict(images)
    torch.testing.assert_close(READERS[format](tmp_path / "out")(images), expected, atol=1e-5, rtol=1e-4)
    capsys.readouterr()
    names = run_card(tmp_path / "out", monkeypatch)
    shown = torch.as_tensor(names["images"])
    fitted = classifier.fit(tmp_path / "out" / "photo.jpg")[None]
    assert (shown.float() - fitted.float()).abs().mean() < 1.5  # levels: two decoders, two resizes
    output = torch.as_tensor(names["output"])
    torch.testing.assert_close(output, classifier.predict(shown), atol=1e-5, rtol=1e-4)
    assert capsys.readouterr().out == f"{classifier.class_names[output[0].argmax()]}\n"
    card = (tmp_path / "out" / "README.md").read_text()
    own = json.loads((adapters[kind].parents[1] / "arms" / f"{adapters[kind].name}.json").read_text())
    (name,) = (name for name in own["figures"] if name.endswith("top1"))
    assert (
        name
        == {"predictor": "finetune/photos_tiny/top1", "encoder": "finetune/photos_tiny/encoder/top1"}[kind]
    )
    assert "astronaut" in card and f"| `{name}` | {own['figures'][name]:.4g} |" in card
    assert "batch_size = 8" in card and "data.num_train = 16" in card
    summary = json.loads((adapters[kind].parents[1] / "summary.json").read_text())["metrics"]
    (row,) = (line for line in card.splitlines() if line.startswith(f"| `{name}` "))
    control = f"{summary[f'{name}_random_predictor']:.4g}" if kind == "predictor" else ""
    assert row.endswith(f"| {control} | {summary['finetune/photos_tiny/chance']:.4g} |")
    before, after = card.split("## Figures of the pretrained checkpoint, before finetuning\n")
    assert "random predictor | best constant answer |" in before and "mrr/mrr" in after
    assert "mrr/mrr" not in before


def test_the_card_says_what_the_run_recorded(clean_run, photo_cache, tmp_path):
    assert export(clean_run, "--format", "timm", "--output", tmp_path / "out") == 0
    card, trained = (tmp_path / "out" / "README.md").read_text(), Trained.open(clean_run)
    recorded = json.loads(trained.run.environment.read_text())
    for word in (
        recorded["data_hash"],
        trained.config.hash(),
        trained.hash,
        "photos_tiny",
        "local-dir:",
        "Apache-2.0",
    ):
        assert word in card
    for field in trained.policy.schema:
        assert f"| `{field.name}` | {field.unit} | {field.identity:g} | {field.scale:g} |" in card
    metrics = json.loads(trained.run.summary.read_text())["metrics"]
    assert f"| `mrr/mrr` | {metrics['mrr/mrr']:.4g} | {metrics['mrr/mrr_low']:.4g} to" in card
    index = Index.open(trained.config.data, "photos_tiny", photo_cache)
    assert f"number of images: {len(index):,}\n" in card


def test_the_card_of_an_earlier_checkpoint_has_its_own_figures(clean_run, tmp_path):
    step = min(int(path.name.split("_")[1]) for path in (clean_run / "checkpoints").glob("step_*"))
    assert export(clean_run, "--format", "timm", "--checkpoint", step, "--output", tmp_path / "out") == 0
    newest = Trained.open(clean_run)
    card = (tmp_path / "out" / "README.md").read_text()
    assert step < newest.step and f"steps: {step}," in card and newest.hash not in card


def test_bad_input_is_one_line_and_exit_2(clean_run, adapters, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    out = ["--output", tmp_path / "out"]
    for arguments, words in (
        ([clean_run, "--format", "tim", *out], ["--format 'tim'", "did you mean 'timm'"]),
        ([clean_run, "--format", "timm", "--encoder", "both", *out], ["--encoder 'both'", "target, context"]),
        ([clean_run, *out], ["--format"]),
        ([tmp_path, "--format", "timm", *out], ["no config.json"]),
        ([adapters["predictor"].parents[1], "--format", "timm", *out], ["holds 2 adapters"]),
        ([clean_run, "--format", "timm", "--checkpoint", "7", *out], ["kept are the steps"]),
        ([clean_run, "--format", "timm", "--output", tmp_path / "taken"], ["there already"]),
        ([clean_run, "--format", "timm", "--output", tmp_path / "taken" / "file" / "x"], ["choose another --output"]),
        ([clean_run, "--format", "timm", "--output", "/proc/x"], ["--output /proc/x: not writable"]),
        ([clean_run, "--format", "timm", "--task", "x", *out], ["--task x", "is a run"]),
        ([adapters["predictor"], "--format", "timm", *out], ["encoders only"]),
        ([adapters["predictor"], "--format", "torch-export", "--task", "cats", *out], ["task 'cats'"]),
    ):  # fmt: skip
        assert export(*arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


def test_a_missing_library_is_named(clean_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    assert export(clean_run, "--format", "onnx", "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "onnxruntime" in error and "iwm_ray[export]" in error and error.count("\n") == 1


def test_an_adapter_that_draws_cannot_be_a_graph(adapters, tmp_path, capsys):
    facts = adapters["predictor"] / "adapter.json"
    before = facts.read_text()
    try:
        facts.write_text(json.dumps(json.loads(before) | {"action": "random"}))
        assert export(adapters["predictor"], "--format", "torch-export", "--output", tmp_path / "out") == 2
    finally:
        facts.write_text(before)
    assert "cannot draw" in capsys.readouterr().err
