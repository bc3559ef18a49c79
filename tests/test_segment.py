import io
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageDraw

import iwm_ray
from iwm_ray.errors import RunError, UsageError
from iwm_ray.export import main as export_main
from iwm_ray.finetuning.tuning import ArmTraining, work
from iwm_ray.predict import main as predict_main
from iwm_ray.segment import main
from iwm_ray.segmentation.data import read_mask
from iwm_ray.segmentation.experiment import Segmentation
from iwm_ray.segmentation.settings import SegmentConfig, SegmentDataConfig
from iwm_ray.trained import Trained
from iwm_ray.workers import train_here


def segment(*arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Bright discs (class 1) and boxes (class 2) on dark ground; options that name them."""
    root = tmp_path_factory.mktemp("shapes")
    generator = np.random.default_rng(0)
    for part, count in (("train", 48), ("val", 16)):
        for kind in ("images", "masks"):
            (root / kind / part).mkdir(parents=True)
        for number in range(count):
            image, mask = Image.new("RGB", (40, 32), (20, 20, 60)), Image.new("L", (40, 32), 0)
            for value, name, colour in ((1, "ellipse", (240, 220, 60)), (2, "rectangle", (60, 240, 90))):
                left, top = (int(place) for place in generator.integers(0, [24, 16]))
                for picture, fill in ((image, colour), (mask, value)):
                    getattr(ImageDraw.Draw(picture), name)((left, top, left + 15, top + 15), fill=fill)
            image.save(root / "images" / part / f"{number:02}.jpg")
            mask.save(root / "masks" / part / f"{number:02}.png")
    return root


def paths(root):
    return {
        "path": str(root / "images/train"),
        "masks": str(root / "masks/train"),
        "test_path": str(root / "images/val"),
        "test_masks": str(root / "masks/val"),
    }


def data(root):
    return [word for name, path in paths(root).items() for word in (f"--data.{name}", path)]


@pytest.fixture(scope="module")
def segmented(clean_run, shapes, tmp_path_factory):
    output = tmp_path_factory.mktemp("segmented") / "out"
    options = ["--steps", 60, "--batch-size", 16, "--seeds", 0, "--lr", "3e-3", "--tune", "predictor", "both"]
    assert segment(clean_run, *data(shapes), *options, "--output", output) == 0
    return output, options


def test_shapes_are_found_better_than_by_a_constant(segmented):
    output, _ = segmented
    found = json.loads((output / "summary.json").read_text())
    metrics = found["metrics"]
    (task,) = {name.split("/")[1] for name in metrics}
    chance = metrics[f"finetune/{task}/miou_chance"]
    # In so few steps only the control learns the shapes: a pretrained predictor moves at a tenth of its rate.
    assert metrics[f"finetune/{task}/miou"] > chance
    assert metrics[f"finetune/{task}/miou_random_predictor"] > chance + 0.1
    for name in ("miou", "miou_random_predictor", "miou_difference", "both/miou"):
        low, value, high = (metrics[f"finetune/{task}/{name}{end}"] for end in ("_low", "", "_high"))
        assert low <= value <= high
    assert [row["class"] for row in found["classes"][:3]] == ["0", "1", "2"]
    assert [(row["tune"], row["predictor"]) for row in found["efficiency"]] == [
        ("predictor", "pretrained"),
        ("predictor", "random"),
        ("both", "pretrained"),
        ("both", "random"),
    ]
    for row in found["efficiency"]:
        assert row["low"] <= row["miou"] <= row["high"] and row["trained_parameters"] > 1000
    assert (output / "efficiency.png").stat().st_size > 10_000
    with Image.open(output / "predictions.png") as picture:
        assert min(picture.size) > 500


def test_arms_that_were_judged_on_other_images_are_named(segmented, clean_run, shapes, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(segmented[0], output)
    path = next((output / "arms").glob("predictor-random-*.json"))
    np.save(path.with_suffix(".npy"), np.load(path.with_suffix(".npy"))[1:])
    os.utime(path, (1, 1))
    assert segment(clean_run, *data(shapes), *segmented[1], "--output", output) == 1
    error = capsys.readouterr().err
    assert f"{path}: judged on 15 images" in error and f"remove {path.name} there" in error
    assert error.count("\n") == 1


def test_finished_arms_are_not_run_again_and_a_lost_one_is_the_same(segmented, clean_run, shapes, capsys):
    output, options = segmented
    before = (output / "summary.json").read_text()
    lost = next((output / "arms").glob("predictor-random-*.json"))
    counts = np.load(lost.with_suffix(".npy"))
    lost.unlink()
    lost.with_suffix(".npy").unlink()
    assert segment(clean_run, *data(shapes), *options, "--output", output) == 0
    assert capsys.readouterr().out.count("step 60/60") == 1
    np.testing.assert_array_equal(np.load(lost.with_suffix(".npy")), counts)
    assert json.loads(before)["metrics"] == json.loads((output / "summary.json").read_text())["metrics"]


def test_what_was_tuned_is_a_segmenter(segmented, shapes, clean_run, tmp_path):
    folders = list((segmented[0] / "adapters").iterdir())
    assert len(folders) == 2
    picture = np.load(next((segmented[0] / "pictured").glob("predictor-pretrained.npy")))
    for folder in folders:
        found = iwm_ray.load(folder)
        assert found.class_names == ("0", "1", "2") and found.image_size == 32
        segmentation = Segmentation.open(
            Trained.open(clean_run), SegmentConfig(data=SegmentDataConfig(**paths(shapes))), tmp_path / "none"
        )
        images = segmentation.test.read(np.arange(6), np.zeros(6, np.int64), 0)[0]
        agrees = (found.predict(images).numpy() == picture).mean()
        assert agrees == 1 if folder.name.startswith("predictor") else agrees < 1


def test_a_segmenter_that_is_missing_is_made_again_and_one_is_enough(segmented, clean_run, shapes, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(segmented[0], output)
    config = SegmentConfig(data=SegmentDataConfig(**paths(shapes)), seeds=(0,), tune=("predictor", "both"))

    def opened(*seeds):
        asked = Segmentation.open(Trained.open(clean_run), config.model_copy(update={"seeds": seeds}), None)
        return replace(asked, folder=output)

    first, *others = finals = [replace(arm, lr=3e-3) for arm in opened(0).finals()]
    assert all(map(opened(0).is_finished, finals)) and all(map(opened(1, 0).is_finished, finals))
    shutil.rmtree(output / "adapters" / first.name)
    assert not opened(0).is_finished(first) and all(map(opened(0).is_finished, others))


def predict(*arguments):
    with pytest.raises(SystemExit) as ended:
        predict_main([str(argument) for argument in arguments])
    return ended.value.code


def test_masks_of_a_folder(segmented, shapes, tmp_path, capsys):
    """At the images' own size, as a folder and as a column; one of the images is broken."""
    adapter = next((segmented[0] / "adapters").glob("predictor-*"))
    images = tmp_path / "images"
    shutil.copytree(shapes / "images/val", images / "val")
    (images / "val" / "03.jpg").write_bytes(b"no picture")
    folder, file = tmp_path / "masks", tmp_path / "masks.parquet"
    for output in (folder, file):
        assert predict(adapter, "--data.path", images, "--output", output) == 0
    out = capsys.readouterr().out
    assert "16 images" in out and "unreadable   1 of them" in out
    rows = {row["row_id"]: row for row in pq.read_table(file).to_pylist()}
    assert len(rows) == 16 and rows["val/03.jpg"]["error"] and rows["val/03.jpg"]["mask"] is None
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.png")} == {
        f"val/{number:02}.png" for number in range(16) if number != 3
    }
    (bad,) = map(json.loads, (folder / "quarantine.jsonl").read_text().splitlines())
    assert bad == {name: rows["val/03.jpg"][name] for name in ("row_id", "path", "error")}
    segmenter = iwm_ray.load(adapter)
    for row_id, row in rows.items():
        if row["error"]:
            continue
        content = (folder / row_id).with_suffix(".png").read_bytes()
        assert content == row["mask"]
        with Image.open(io.BytesIO(content)) as mask, Image.open(images / row_id) as image:
            assert mask.size == image.size == (40, 32)
            values, pixels = np.array(mask), np.array(image)
        expected = segmenter.predict(segmenter.fit(pixels)[None])[0]
        columns = ((np.arange(40) + 0.5) * 32 / 40).astype(int)
        assert (values == expected.numpy()[:, columns]).mean() > 0.99  # decoders of JPEG differ a little
        assert row["classes"][0] == segmenter.class_names[np.bincount(expected.flatten()).argmax()]
        assert sum(row["shares"]) == pytest.approx(1) and row["shares"] == sorted(row["shares"])[::-1]
    with Image.open(tmp_path / "masks-overview.png") as picture:
        assert min(picture.size) > 300
    # What is predicted can be read as masks.
    assert read_mask(folder / "val/00.png", (32, 40)).max() <= 2


def test_where_masks_cannot_go(segmented, shapes, tmp_path, capsys):
    adapter = next((segmented[0] / "adapters").iterdir())
    (tmp_path / "there" / "more").mkdir(parents=True)
    twice = tmp_path / "twice"
    twice.mkdir()
    for name in ("a.jpg", "a.jpeg"):
        shutil.copy(shapes / "images/val/00.jpg", twice / name)
    for images, output, words in (
        (shapes / "images/val", "there", "there already"),
        (shapes / "images/val", "masks.csv", "ends in .parquet, or of a new folder"),
        (twice, "masks", "would both have the mask a.png"),
    ):
        assert predict(adapter, "--data.path", images, "--output", tmp_path / output) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error, error
    words = ["--data.path", shapes / "images/val", "--output", tmp_path / "masks", "--top", 3]
    assert predict(adapter, *words) == 2 and "--top 3: " in capsys.readouterr().err
    assert not (tmp_path / "masks").exists() and not list(tmp_path.glob(".masks*"))


def test_a_segmenter_on_another_encoder_is_refused(segmented, clean_run, tmp_path):
    folder = next((segmented[0] / "adapters").iterdir())
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    facts = json.loads((copy / "segmenter.json").read_text())
    (copy / "segmenter.json").write_text(json.dumps(facts | {"encoder_hash": "0123"}))
    with pytest.raises(UsageError, match="belongs to the encoder 0123, this one is"):
        iwm_ray.load(copy, run=clean_run)
    (copy / "segmenter.json").write_text(json.dumps(facts | {"config": {"steps": "many"}}))
    with pytest.raises(RunError, match=r"damaged \(config.steps: .*segment again"):
        iwm_ray.load(copy, run=clean_run)
    (copy / "segmenter.json").write_text(json.dumps(facts))
    (copy / "segmenter.safetensors").write_bytes(b"damaged")
    with pytest.raises(RunError, match="segment again"):
        iwm_ray.load(copy, run=clean_run)


def test_a_segmenter_cannot_be_exported(segmented, tmp_path, capsys):
    folder = next((segmented[0] / "adapters").iterdir())
    with pytest.raises(SystemExit) as ended:
        export_main([str(folder), "--format", "torch-export", "--output", str(tmp_path / "out")])
    assert ended.value.code == 2 and "a segmenter has no format here" in capsys.readouterr().err


def test_figures_join_those_of_the_run(clean_run, shapes, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(clean_run, run)
    small = ["--steps", 2, "--batch-size", 8, "--seeds", 0, "--tune", "encoder", "--head", "linear"]
    assert segment(run, *data(shapes), *small) == 0
    (folder,) = (run / "finetune").iterdir()
    assert folder.name.startswith("segment-")
    measured = json.loads((folder / "summary.json").read_text())["metrics"]
    assert measured.items() <= json.loads((run / "summary.json").read_text())["metrics"].items()


def test_the_rate_is_chosen_on_held_out_training_images(clean_run, shapes, tmp_path):
    output = tmp_path / "out"
    grid = [
        "--lr-grid",
        "1e-9",
        "1e-2",
        "--steps",
        20,
        "--batch-size",
        16,
        "--seeds",
        0,
        1,
        "--tune",
        "encoder",
    ]
    assert segment(clean_run, *data(shapes), *grid, "--head", "linear", "--output", output) == 0
    facts = {path.stem: json.loads(path.read_text()) for path in (output / "arms").glob("*.json")}
    choices = {name: each for name, each in facts.items() if each["arm"]["is_choice"]}
    assert len(choices) == 2 and len(facts) == 4
    for name in choices:  # a tenth of 48
        assert np.load(output / "arms" / f"{name}.npy").shape == (5, 3, 3)
    scores = {}
    for name, each in choices.items():
        right, predicted, there = np.load(output / "arms" / f"{name}.npy").sum(0)
        scores[each["arm"]["lr"]] = float(np.mean(right / (predicted + there - right)))
    best = max(scores, key=scores.get)
    assert {each["arm"]["lr"] for each in facts.values() if not each["arm"]["is_choice"]} == {best}
    assert len(list((output / "adapters").iterdir())) == 1


def test_a_batch_without_a_readable_image_is_passed_over(clean_run, shapes, tmp_path):
    root = tmp_path / "shapes"
    shutil.copytree(shapes, root)
    for number in (0, 1, 14, 15):  # all of the last batch; and the first two files
        (root / f"images/val/{number:02}.jpg").write_bytes(b"no picture")
    options = ["--steps", 1, "--batch-size", 1, "--seeds", 0, "--tune", "encoder", "--head", "linear"]
    options += ["--data.max-bad-fraction", 0.5]
    assert segment(clean_run, *data(root), *options, "--output", tmp_path / "out") == 0
    (counts,) = (tmp_path / "out/arms").glob("*.npy")
    assert len(np.load(counts)) == 12


def test_a_dry_run_creates_nothing(clean_run, shapes, tmp_path, capsys):
    groups = tmp_path / "groups.json"
    groups.write_text(json.dumps({"ground": [0], "shape": [1, 2]}))
    options = [*data(shapes), "--data.classes", groups, "--image-size", 64, "--output", tmp_path / "out"]
    assert segment(clean_run, *options, "--dry-run") == 0
    assert "64 pixels, 2 classes" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_a_folder_that_was_begun_with_the_size_of_pretraining_goes_on(clean_run, shapes, tmp_path):
    """By a version that took it for another one."""
    trained, config = Trained.open(clean_run), SegmentConfig(data=SegmentDataConfig(**paths(shapes)))
    asked = config.model_copy(update={"image_size": 32})
    before = replace(Segmentation.open(trained, config, tmp_path), config=asked)
    before.start()
    found = Segmentation.open(trained, asked, tmp_path)
    assert found.name == before.name != Segmentation.open(trained, asked, None).name
    with pytest.raises(UsageError, match="image_size 32 != 0; choose another --output"):
        Segmentation.open(trained, config, tmp_path)


def test_the_size_of_pretraining_needs_no_name(clean_run, shapes):
    config = SegmentConfig(data=SegmentDataConfig(**paths(shapes)))

    def opened(size):
        asked = config.model_copy(update={"image_size": size})
        return Segmentation.open(Trained.open(clean_run), asked, None)

    assert opened(32).name == opened(0).name and opened(32).config.ways == ()
    assert opened(64).name != opened(0).name and opened(64).config.ways == ("64_pixels",)


def test_bad_input_is_one_line_and_exit_2(segmented, clean_run, shapes, tmp_path, capsys):
    (tmp_path / "bad.json").write_text("[1]")
    (tmp_path / "columns.csv").write_text("a,b\n0,ground\n")
    (tmp_path / "large.json").write_text('{"ground": [0], "shape": [300]}')
    (tmp_path / "file").write_text("")
    for path in (shapes / "images/val").iterdir():
        (tmp_path / "cut" / path.name).parent.mkdir(exist_ok=True)
        (tmp_path / "cut" / path.name).write_bytes(path.read_bytes()[:-400])
    (tmp_path / "empty").mkdir()
    (tmp_path / "twice.csv").write_text("index,name\n0,ground\n1,shape\n2,shape\n")
    (tmp_path / "both.json").write_text('{"ground": [0, 1], "shape": [1, 2]}')
    shutil.copytree(shapes / "masks/val", tmp_path / "small")
    Image.new("L", (20, 16)).save(tmp_path / "small/07.png")
    good, out = data(shapes), ["--output", tmp_path / "out"]
    same = {"--data.test-path": shapes / "images/train", "--data.test-masks": shapes / "masks/train"}
    for arguments, words in (
        (out, ["--data.path is missing"]),
        ([*good[:4], *out], ["--data.test-path is missing"]),
        ([*good, "--data.masks", tmp_path / "none", *out], ["no such folder"]),
        ([*good, "--data.masks", tmp_path / "empty", *out], ["48 of 48 images have no mask"]),
        ([*good, "--data.classes", tmp_path / "bad.json", *out], ["bad.json", "ccp8"]),
        (
            [*good, "--data.classes", tmp_path / "columns.csv", *out],
            ["columns.csv: no column 'name'", "the columns index and name"],
        ),
        (
            [*good, "--data.classes", tmp_path / "large.json", *out],
            ["large.json", "the class 'shape' has the value 300", "0 to 255"],
        ),
        (
            [*good, "--data.test-path", tmp_path / "cut", *out],
            [f"--data.test-path {tmp_path / 'cut'}: none of 16 images tried", ".jpg: JPEG"],
        ),
        ([*good, "--layer-decay", 0.5, *out], ["--layer-decay 0.5: changes nothing with --tune predictor"]),
        ([*good, "--output", tmp_path / "file", "--dry-run"], ["not a writable folder"]),
        (
            [*good, "--data.classes", tmp_path / "twice.csv", *out],
            ["twice.csv", "'shape' stands there twice"],
        ),
        (
            [*good, "--data.classes", tmp_path / "both.json", *out],
            ["both.json", "value 1 stands there twice"],
        ),
        ([*good, "--data.test-masks", tmp_path / "small", *out], ["07.png", "20 x 16", "07.jpg", "40 x 32"]),
        ([*good, *(word for pair in same.items() for word in pair), *out], ["holds the training images"]),
        ([*good, "--image-size", 33, *out], ["--image-size 33", "patch of 8"]),
        ([*good, "--head", "unet", *out], ["head 'unet'", "'linear' or 'upernet'"]),
        ([*good, "--output", segmented[0]], ["batch_size 16 != 32 (+2 more)", "choose another --output"]),
    ):
        assert segment(clean_run, *arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("crop_area", [1, 0.5], ids=["tokens", "images"])
def test_undecodable_images_are_counted_named_and_limited(clean_run, shapes, tmp_path, capsys, crop_area):
    shutil.copytree(shapes, tmp_path / "shapes")
    for part, count in (("train", 5), ("val", 1)):
        for path in sorted((tmp_path / "shapes/images" / part).iterdir())[:count]:
            path.write_bytes(path.read_bytes()[:-400])
    options = ["--steps", 6, "--batch-size", 16, "--seeds", 0, "--augment.crop-area", crop_area]
    options += [*data(tmp_path / "shapes"), "--output", tmp_path / "out"]
    assert segment(clean_run, *options) == 1
    assert "5 of 48 training images of shapes cannot be decoded, e.g. 0" in capsys.readouterr().err
    assert segment(clean_run, *options, "--data.max-bad-fraction", 0.2) == 0
    out = capsys.readouterr().out
    assert "5 of 48 training images of shapes cannot be decoded, e.g. 0" in out
    assert "1 of 16 test images of shapes cannot be decoded, e.g. 00.jpg: JPEG" in out
    found = json.loads((tmp_path / "out/summary.json").read_text())
    assert found["undecodable"] == {"training images of shapes": 5, "test images of shapes": 1}
    assert len((tmp_path / "out/quarantine/train.jsonl").read_text().splitlines()) == 5
    assert "shapes: chance " in out and "shapes: pretrained minus random predictor " in out


@pytest.mark.parametrize(
    ("change", "classes", "words"),
    [
        (lambda value: 255 * (value > 0), {"ground": [0], "shape": [255]}, ["--data.ignore 255", "'shape'", "-1"]),
        (lambda value: 255 * (value > 0), None, ["pixels of 1 classes", "value 255", "--data.ignore -1"]),
        (lambda value: value, {"disc": [7], "box": [8]}, ["masks/train", "pixels of 0 classes", "--data.classes"]),
        (lambda value: value, {"disc": [1], "box": [8]}, ["masks/train", "pixels of 1 classes", "two or more"]),
    ],
)  # fmt: skip
def test_masks_without_two_classes_are_refused(clean_run, shapes, tmp_path, capsys, change, classes, words):
    shutil.copytree(shapes, tmp_path / "shapes")
    for path in (tmp_path / "shapes/masks").rglob("*.png"):
        with Image.open(path) as mask:
            mask.point(change).save(path)
    options = data(tmp_path / "shapes")
    if classes is not None:
        (tmp_path / "classes.json").write_text(json.dumps(classes))
        options += ["--data.classes", tmp_path / "classes.json"]
    assert segment(clean_run, *options, "--dry-run") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error
    if "255" in error:
        assert segment(clean_run, *options, "--data.ignore", -1, "--dry-run") == 0


def test_test_masks_without_a_class_and_coloured_masks_are_refused(clean_run, shapes, tmp_path, capsys):
    (tmp_path / "classes.json").write_text('{"disc": [1], "box": [2]}')
    named = ["--data.classes", tmp_path / "classes.json", "--dry-run"]
    for part, change, words in (
        ("val", lambda mask: mask.point(lambda value: 0), "masks/val: pixels of 0 classes"),
        ("train", lambda mask: mask.convert("RGB"), "mode RGB"),
        ("val", lambda mask: mask.convert("RGB"), "mode RGB"),
    ):
        shutil.copytree(shapes, tmp_path / "shapes")
        for path in (tmp_path / "shapes/masks" / part).iterdir():
            with Image.open(path) as mask:
                change(mask).save(path)
        assert segment(clean_run, *data(tmp_path / "shapes"), *named) == 2
        assert words in capsys.readouterr().err
        shutil.rmtree(tmp_path / "shapes")


def test_test_images_among_the_training_images_are_refused(clean_run, shapes, tmp_path, capsys):
    """The folder of training images lies in that of the test images."""
    for kind in ("images", "masks"):
        shutil.copytree(shapes / kind, tmp_path / kind)
        shutil.copytree(shapes / kind / "train", tmp_path / kind / "val/more")
    where = paths(tmp_path)
    where |= {"path": f"{where['test_path']}/more", "masks": f"{where['test_masks']}/more"}
    options = [word for name, path in where.items() for word in (f"--data.{name}", path)]
    assert segment(clean_run, *options, "--dry-run") == 2
    assert "48 of 64 images are training images too, such as" in capsys.readouterr().err


def test_other_masks_have_another_folder(clean_run, shapes, tmp_path):
    """Of the same names and sizes, for the same images."""
    shutil.copytree(shapes / "masks/val", tmp_path / "masks")
    asked = [paths(shapes), paths(shapes) | {"test_masks": str(tmp_path / "masks")}]
    names = [_folder(clean_run, each) for each in asked]
    Image.open(tmp_path / "masks/03.png").point(lambda value: 2 * (value == 1) + (value == 2)).save(
        tmp_path / "masks/03.png"
    )
    names.append(_folder(clean_run, asked[1]))
    assert names[0] == names[1] != names[2]


def _folder(run, where):
    config = SegmentConfig(data=SegmentDataConfig(**where))
    return Segmentation.open(Trained.open(run), config, None).folder


def test_a_stopped_segmentation_goes_on_to_the_same_bits(clean_run, shapes, tmp_path):
    """Statistics of the head's batch normalisation are in the checkpoint."""
    config = SegmentConfig(
        data=SegmentDataConfig(**paths(shapes)), steps=12, batch_size=8, seeds=(0,), tune=("encoder",)
    )
    contents = []
    for name in ("clean", "stopped"):
        segmentation = Segmentation.open(Trained.open(clean_run), config, tmp_path / name)
        training = ArmTraining(segmentation, segmentation.finals()[0])
        training.run.path.mkdir(parents=True)
        request = tmp_path / name / "stop-request"
        if name == "stopped":
            request.touch()
            assert train_here(training, work).status == "stopped"
            request.unlink()
        assert train_here(training, work).status == "finished"
        contents.append(next(tmp_path.glob(f"{name}/adapters/*/segmenter.safetensors")).read_bytes())
    assert contents[0] == contents[1]


def test_cached_tokens_are_those_of_the_images(clean_run, shapes, tmp_path):
    """On a larger grid than in pretraining, mirrored as the mask is; an image that cannot be decoded counts for nothing."""
    root = tmp_path / "shapes"
    shutil.copytree(shapes, root)
    (root / "images/train/05.jpg").write_bytes(b"no picture")
    config = SegmentConfig(
        data=SegmentDataConfig(**paths(root)),
        steps=3,
        batch_size=16,
        image_size=64,
        augment={"crop_area": 1.0},
    )
    runtime = config.runtime.model_copy(update={"token_gigabytes": 0.0})
    trained = Trained.open(clean_run)
    cached = Segmentation.open(trained, config, tmp_path / "cached")
    read = Segmentation.open(trained, config.model_copy(update={"runtime": runtime}), tmp_path / "read")
    arm = cached.finals()[0]
    assert cached.has_tokens(arm) and not read.has_tokens(arm)
    cropped = config.model_copy(update={"augment": config.augment.model_copy(update={"crop_area": 0.5})})
    assert not Segmentation.open(trained, cropped, tmp_path / "cropped").has_tokens(arm)
    ours, theirs = cached.rows(arm), read.rows(arm)
    encoder, blank = cached.assemble(arm).encoder, 0
    for step in range(3):
        counters = np.arange(step * 16, step * 16 + 16)
        one, other = ours.rows(counters), theirs.rows(counters)
        np.testing.assert_array_equal(one["labels"], other["labels"])
        with torch.no_grad():
            expected = encoder(torch.from_numpy(other["inputs"])).numpy()
        ignored = (one["labels"] == 255).all((1, 2))
        assert one["inputs"].shape == (16, 64, 64)
        np.testing.assert_allclose(one["inputs"][~ignored], expected[~ignored], atol=1e-4)
        blank += int(ignored.sum())
    assert blank == 1


def test_a_segmentation_from_cached_tokens(clean_run, shapes, tmp_path):
    options = [
        "--steps",
        4,
        "--batch-size",
        8,
        "--seeds",
        0,
        "--augment.crop-area",
        1,
        "--output",
        tmp_path / "out",
    ]
    cache = ["--runtime.cache", tmp_path / "cache"]
    assert segment(clean_run, *data(shapes), *options, *cache) == 0
    facts = [json.loads(path.read_text()) for path in (tmp_path / "out/arms").glob("*.json")]
    assert [each["inputs"] for each in facts] == ["tokens", "tokens"]
    assert len(list((tmp_path / "cache/features").iterdir())) == 2
