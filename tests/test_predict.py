import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import iwm_ray
from iwm_ray import driver
from iwm_ray.errors import UsageError
from iwm_ray.predict import main


def predict(*arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


@pytest.fixture(scope="module")
def adapter(clean_run, tmp_path_factory):
    from iwm_ray.finetune import main as finetune

    output = tmp_path_factory.mktemp("tuned") / "out"
    words = "--data.path photos_tiny --data.test-path photos_tiny:test --steps 2 --batch-size 8 --data.num-train 16"
    with pytest.raises(SystemExit) as ended:
        finetune(
            [str(clean_run), *words.split(), "--data.num-test", "8", "--seeds", "0", "--output", str(output)]
        )
    assert ended.value.code == 0
    return next((output / "adapters").iterdir())


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """140 images of noise without labels; the third one is broken."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number in range(140):
        pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
    (folder / "002.png").write_bytes(b"no picture")
    return folder


def expected(adapter, images):
    classifier = iwm_ray.load(adapter)
    found = {}
    for path in sorted(images.iterdir()):
        if path.name != "002.png":
            pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None]
            found[path.name] = classifier.predict(pixels)[0].numpy()
    return classifier.class_names, found


def test_one_row_for_each_image(adapter, images, tmp_path, capsys):
    output = tmp_path / "deep" / "found.parquet"
    assert predict(adapter, "--data.path", images, "--top", 3, "--output", output) == 0
    rows = pq.read_table(output).to_pylist()
    names, probabilities = expected(adapter, images)
    assert [row["row_id"] for row in rows] == [f"{number:03}.png" for number in range(140)]
    for row in rows:
        assert row["path"] == str(images / row["row_id"])
        if row["row_id"] == "002.png":
            assert row["error"] and row["class"] is None and row["probability"] is None
            continue
        scores = probabilities[row["row_id"]]
        order = np.argsort(-scores, kind="stable")[:3]
        assert row["error"] is None and row["class"] == row["top_classes"][0]
        assert row["top_classes"] == [names[place] for place in order]
        np.testing.assert_allclose(row["top_probabilities"], scores[order], rtol=1e-4)
        assert row["probability"] == row["top_probabilities"][0]
    out = capsys.readouterr().out
    assert "140 images" in out and "unreadable   1 of them" in out
    assert [path.name for path in output.parent.iterdir()] == ["found.parquet"]


def test_more_classes_than_there_are_is_all(adapter, images, tmp_path):
    assert predict(adapter, "--data.path", images, "--top", 99, "--output", tmp_path / "a.parquet") == 0
    assert len(pq.read_table(tmp_path / "a.parquet")["top_classes"][0]) == len(
        iwm_ray.load(adapter).class_names
    )


def test_an_adapter_is_found_where_it_is_the_only_one(adapter, clean_run, images, tmp_path, capsys):
    """Beside an encoder that has moved."""
    run = tmp_path / "run"
    shutil.copytree(clean_run, run)
    tuned = run / "finetune" / "photos"
    shutil.copytree(adapter.parent, tuned / "adapters")
    for path in (tuned, run):
        assert iwm_ray.find_adapter(path) == tuned / "adapters" / adapter.name
    facts = tuned / "adapters" / adapter.name / "adapter.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"run": "elsewhere"}))
    out = ["--output", tmp_path / "out.parquet"]
    assert predict(run, "--data.path", images, *out) == 2
    assert "elsewhere" in capsys.readouterr().err
    assert predict(run, "--data.path", images, "--run", run, *out) == 0
    shutil.copytree(adapter, tuned / "adapters" / "another")
    with pytest.raises(UsageError, match="holds 2 adapters; give one of them, such as .*another"):
        iwm_ray.load(run)


def test_without_ray_engine_ray_is_one_line(adapter, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(driver.importlib.util, "find_spec", lambda name: None)
    words = ["--data.path", images, "--output", tmp_path / "out.parquet", "--runtime.engine", "ray"]
    assert predict(adapter, *words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "ray is not installed" in error


def test_a_damaged_adapter_is_one_line(adapter, images, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(adapter, copy)
    facts = json.loads((copy / "adapter.json").read_text())
    words = ["--data.path", images, "--output", tmp_path / "out.parquet"]
    shape = facts["predictor"] | {"config": {"depth": "many"}}
    for text in (
        json.dumps(facts)[:100],
        "[]",
        json.dumps(facts | {"tasks": 1}),
        json.dumps(facts | {"predictor": shape}),
    ):
        (copy / "adapter.json").write_text(text)
        assert predict(copy, *words) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "adapter.json is damaged" in error, error


def test_bad_input_is_one_line_and_exit_2(adapter, images, tmp_path, capsys):
    (tmp_path / "there.parquet").touch()
    (tmp_path / "empty").mkdir()
    out = ["--output", tmp_path / "out.parquet"]
    for arguments, words in (
        ([tmp_path, "--data.path", images, *out], ["no adapter.json"]),
        ([adapter, *out], ["--data.path is missing"]),
        ([adapter, "--data.path", tmp_path / "empty", *out], ["empty"]),
        ([adapter, "--data.path", images], ["--output"]),
        ([adapter, "--data.path", images, "--output", tmp_path / "out.csv"], [".parquet"]),
        ([adapter, "--data.path", images, "--output", tmp_path / "there.parquet"], ["there already"]),
        ([adapter, "--data.path", images, "--output", "/proc/x.parquet"], ["/proc/x.parquet: not writable"]),
        ([tmp_path / "none", "--data.path", images, *out], ["none: no such folder"]),
        ([adapter, "--data.path", images, "--top", "0", *out], ["--top 0"]),
        ([adapter, "--data.path", images, "--task", "cats", *out], ["task 'cats'"]),
        ([adapter, "--data.pat", images, *out], ["did you mean '--data.path'"]),
    ):
        assert predict(*arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(word in error for word in words), error
    assert not (tmp_path / "out.parquet").exists()
