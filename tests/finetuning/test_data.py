import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iwm_ray.errors import UsageError
from iwm_ray.evaluation.encoders import RunEncoder
from iwm_ray.finetuning.data import (
    Steps,
    TokenRows,
    alternate,
    encode,
    in_order,
    mixed,
    named_paths,
    open_tasks,
)
from iwm_ray.finetuning.settings import AugmentConfig, FinetuneConfig

ZERO = np.zeros(8, np.int64)
FIRST = np.arange(8)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_tasks_take_turns_evenly(counts):
    schedule = alternate(counts)
    assert np.bincount(schedule, minlength=len(counts)).tolist() == counts
    for task, count in enumerate(counts):
        done = (schedule == task).cumsum()
        due = np.arange(1, len(schedule) + 1) * count / len(schedule)
        assert np.abs(done - due).max() <= len(counts)


@pytest.mark.parametrize(
    ("words", "paths"),
    [
        (["a=/x/y.parquet", "b=s3://c/d"], {"a": "/x/y.parquet", "b": "s3://c/d"}),
        (["/data/cifar10/train.parquet"], {"cifar10": "/data/cifar10/train.parquet"}),
        (["photos_tiny:test"], {"photos_tiny": "photos_tiny:test"}),
        (["s3://bucket/birds/?region=x"], {"_region_x": "s3://bucket/birds/?region=x"}),
        (["/data/flowers/"], {"flowers": "/data/flowers/"}),
    ],
)
def test_data_sets_have_names(words, paths):
    assert named_paths("data.path", words) == paths


def test_two_data_sets_of_one_name():
    with pytest.raises(UsageError, match="two data sets are called 'x'"):
        named_paths("data.path", ["/a/x", "/b/x"])


def test_tokens_computed_once_are_those_of_the_images(task, model, trained):
    tokens = TokenRows(encode(RunEncoder(trained, for_predictor=True), task.train, batch_size=7))
    drawn, images = tokens.rows(FIRST, ZERO, 0), task.train.rows(FIRST, ZERO, 0)
    with torch.no_grad():
        torch.testing.assert_close(drawn.inputs, model.target_encoder(images.inputs), atol=1e-5, rtol=1e-4)
    assert torch.equal(drawn.labels, images.labels)


def test_cached_and_streamed_flips_are_the_same(task, model, trained):
    flip = AugmentConfig(flip_probability=0.5)
    plain, flipped = (
        encode(RunEncoder(trained, for_predictor=True, mirrored=mirrored), task.train)
        for mirrored in (False, True)
    )
    epochs = np.array([0, 1] * 4)
    cached = TokenRows(plain, flipped, 0.5).rows(FIRST, epochs, 3)
    streamed = replace(task.train, augment=flip).rows(FIRST, epochs, 3)
    with torch.no_grad():
        expected = model.target_encoder(streamed.inputs)
    torch.testing.assert_close(cached.inputs, expected, atol=1e-5, rtol=1e-4)
    assert not torch.equal(cached.inputs, TokenRows(plain).rows(FIRST, epochs, 3).inputs)


def test_an_epoch_sees_every_image_once_and_seeds_differ(task):
    class Numbers:
        def __len__(self):
            return 24

        def rows(self, places, epochs, seed):
            return type(task.train.rows(FIRST, ZERO, 0))(torch.tensor(places), torch.tensor(epochs), places)

    schedule = np.zeros(6, np.int64)
    steps = [Steps((Numbers(),), schedule, 8, seed) for seed in (0, 0, 1)]
    seen = [torch.cat([step.inputs for step in one.batches(0)]).tolist() for one in steps]
    assert sorted(seen[0][:24]) == sorted(seen[0][24:]) == list(range(24))
    assert seen[0] == seen[1] != seen[2]
    assert seen[0][:24] != seen[0][24:]


@pytest.mark.slow
def test_other_processes_make_the_same_batches(task):
    rows = replace(task.train, augment=AugmentConfig(crop_area=0.5, flip_probability=0.5))
    steps = Steps((rows, rows), alternate([2, 1]), 8, 0)
    for ours, theirs in zip(steps.batches(0), steps.batches(1), strict=True):
        assert ours.task == theirs.task
        assert torch.equal(ours.inputs, theirs.inputs) and torch.equal(ours.labels, theirs.labels)


def test_strong_augmentation_depends_on_seed_epoch_and_image_only(task):
    rows = replace(task.train, augment=AugmentConfig(crop_area=0.3, randaugment=9, flip_probability=0.5))
    ones = np.ones_like(ZERO)
    first = rows.rows(FIRST, ZERO, 0).inputs
    torch.manual_seed(99)
    assert torch.equal(rows.rows(FIRST[::-1].copy(), ZERO, 0).inputs.flip(0), first)
    assert not torch.equal(rows.rows(FIRST, ones, 0).inputs, first)
    assert not torch.equal(rows.rows(FIRST, ZERO, 1).inputs, first)
    assert first.shape == (8, 3, 32, 32)


@pytest.mark.parametrize("way", ["mixup", "cutmix"])
def test_mixed_labels_are_shares(task, way):
    drawn = task.train.rows(FIRST, ZERO, 0)
    images, labels = mixed(drawn.inputs, drawn.labels, 10, AugmentConfig(**{way: 1.0}), 0, 0)
    assert labels.shape == (8, 10)
    torch.testing.assert_close(labels.sum(1), torch.ones(8))
    assert images.shape == drawn.inputs.shape and float(images.min()) >= 0 and float(images.max()) <= 1
    again, _ = mixed(drawn.inputs, drawn.labels, 10, AugmentConfig(**{way: 1.0}), 0, 0)
    assert torch.equal(images, again)


def test_without_mixing_the_batch_is_left_alone(task):
    drawn = task.train.rows(FIRST, ZERO, 0)
    images, labels = mixed(drawn.inputs, drawn.labels, 10, AugmentConfig(), 0, 0)
    assert images is drawn.inputs and labels is drawn.labels


def test_an_unreadable_image_is_left_out(tmp_path, task, trained):
    for name in ("train/a", "train/b", "test/a"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(3):
            shutil.copy(task.train.index.path(number), tmp_path / name / f"{number}.png")
    (tmp_path / "train" / "a" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    data = {"path": [str(tmp_path / "train")], "test_path": [str(tmp_path / "test")]}
    (found,) = open_tasks(FinetuneConfig.model_validate({"data": data}), trained.config, tmp_path / "cache")
    assert len(found.train) == 7
    assert sum(len(drawn.labels) for drawn in in_order(found.train, 4)) == 6
    assert len(encode(RunEncoder(trained), found.train).labels) == 6


def test_choices_are_fixed_and_a_smaller_one_begins_the_larger(trained, config, task, tmp_path):
    fewer = config.model_copy(update={"data": config.data.model_copy(update={"num_train": 10})})
    (again,) = open_tasks(fewer, trained.config, tmp_path)
    assert again.train.samples.tolist() == task.train.samples[:10].tolist()
    assert len(set(task.train.samples.tolist())) == 40
