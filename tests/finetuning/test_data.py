import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iwm_ray.data.quarantine import Quarantine
from iwm_ray.errors import RunError, UsageError
from iwm_ray.evaluation.encoders import RunEncoder
from iwm_ray.evaluation.features import Features
from iwm_ray.finetuning.data import (
    Drawn,
    Steps,
    TokenRows,
    Tokens,
    alternate,
    encode,
    in_order,
    mixed,
    named_paths,
    note_missing,
    open_tasks,
)
from iwm_ray.finetuning.settings import AugmentConfig, FinetuneConfig
from iwm_ray.loader import local_columns

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


def cached(rows, tokens, flip_probability=0.0):
    return TokenRows(rows.samples, rows.labels, tokens, flip_probability)


def test_tokens_computed_once_are_those_of_the_images(task, model, trained):
    tokens = cached(
        task.train, Tokens(encode(RunEncoder(trained, for_predictor=True), task.train, batch_size=7))
    )
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
    ours = cached(task.train, Tokens(plain, flipped), 0.5).rows(FIRST, epochs, 3)
    streamed = replace(task.train, augment=flip).rows(FIRST, epochs, 3)
    with torch.no_grad():
        expected = model.target_encoder(streamed.inputs)
    torch.testing.assert_close(ours.inputs, expected, atol=1e-5, rtol=1e-4)
    assert not torch.equal(ours.inputs, cached(task.train, Tokens(plain)).rows(FIRST, epochs, 3).inputs)


def test_rows_of_tokens_stay_where_the_disk_has_them(task, trained):
    """No part of them is copied to memory but those that are asked for."""
    plain = encode(RunEncoder(trained, for_predictor=True), task.train)
    part = task.train.part(5, 15)
    rows = cached(part, Tokens(plain))
    assert len(rows) == 10 and rows.tokens.plain.values is plain.values
    np.testing.assert_array_equal(rows.rows(FIRST, ZERO, 0).inputs, plain.values[5:13])


class Numbers:
    """A split of 24 images whose pictures are their numbers."""

    view_bytes = 8

    def __len__(self):
        return 24

    def rows(self, places, epochs, seed):
        numbers = torch.tensor(places)
        return Drawn(numbers, numbers, places, np.ones(len(places), np.bool_))


def test_an_epoch_sees_every_image_once_and_seeds_differ():
    counters = np.arange(48).reshape(6, 8)
    seen = []
    for seed in (0, 0, 1):
        steps = Steps((Numbers(),), np.zeros(6, np.int64), 8, seed)
        seen.append(np.concatenate([steps.rows(part)["inputs"] for part in counters]).tolist())
    assert sorted(seen[0][:24]) == sorted(seen[0][24:]) == list(range(24))
    assert seen[0] == seen[1] != seen[2]
    assert seen[0][:24] != seen[0][24:]


@pytest.mark.parametrize("num_workers", [2, 4])
def test_shares_are_parts_of_the_batch(task, num_workers):
    """Whoever makes which rows, in whatever order: an image has the same augmentation and the same partner."""
    rows = replace(task.train, augment=AugmentConfig(crop_area=0.5, flip_probability=0.5))
    steps = Steps((rows, rows), alternate([2, 1]), 8, 0, has_partners=True)
    for step in range(3):
        counters = np.arange(step * 8, step * 8 + 8)
        whole = steps.rows(counters)
        np.testing.assert_array_equal(whole["partners"], np.roll(whole["inputs"], 1, axis=0))
        np.testing.assert_array_equal(whole["partner_labels"], np.roll(whole["labels"], 1))
        parts = [steps.rows(part) for part in np.split(counters, num_workers)]
        for name, values in whole.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), values)


@pytest.mark.slow
def test_other_processes_make_the_same_batches(task):
    rows = replace(task.train, augment=AugmentConfig(crop_area=0.5, flip_probability=0.5))
    steps = Steps((rows, rows), alternate([2, 1]), 8, 0)
    here, there = (local_columns(steps, 8, 1, 3, processes, pin=False) for processes in (0, 1))
    for ours, theirs in zip(here, there, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


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
    images, labels = drawn.inputs, drawn.labels
    augment = AugmentConfig(**{way: 1.0})
    assert augment.mixes and not AugmentConfig().mixes

    def mix(part):
        return mixed(
            images[part], labels[part], images.roll(1, 0)[part], labels.roll(1)[part], 10, augment, 0, 0
        )

    found, shares = mix(slice(None))
    assert shares.shape == (8, 10)
    torch.testing.assert_close(shares.sum(1), torch.ones(8))
    assert found.shape == images.shape and float(found.min()) >= 0 and float(found.max()) <= 1
    assert torch.equal(torch.cat([mix(slice(0, 2))[0], mix(slice(2, 8))[0]]), found)
    # The share of the label says how much of the image there is.
    row = int((labels != labels.roll(1)).nonzero()[0])
    share, own, other = float(shares[row, labels[row]]), images[row] / 255, images.roll(1, 0)[row] / 255
    if way == "mixup":
        torch.testing.assert_close(found[row], share * own + (1 - share) * other)
    else:
        differs = (own != other).any(0)
        kept = (found[row] == own).all(0)[differs].float().mean()
        assert float(kept) == pytest.approx(share, abs=0.1)


def test_an_unreadable_image_is_left_out(tmp_path, task, trained):
    for name in ("train/a", "train/b", "test/a"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(3):
            shutil.copy(task.train.index.path(number), tmp_path / name / f"{number}.png")
    (tmp_path / "train" / "a" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    data = {"path": [str(tmp_path / "train")], "test_path": [str(tmp_path / "test")]}
    (found,) = open_tasks(FinetuneConfig.model_validate({"data": data}), trained.config, tmp_path / "cache")
    assert len(found.train) == 7
    steps = Steps((found.train,), np.zeros(1, np.int64), 7, 0)
    columns = steps.rows(np.arange(7))
    assert sorted(columns["weight"]) == [0, 1, 1, 1, 1, 1, 1]
    assert not columns["inputs"][columns["weight"] == 0].any()
    assert sum(len(drawn.labels) for drawn in in_order(found.train, 4)) == 6
    # Batches of one: the empty one is passed over.
    assert [len(drawn.labels) for drawn in in_order(found.train, 1)] == [1] * 6
    (place,) = (
        number for number in range(7) if not found.train.rows(np.array([number]), ZERO[:1], 0).readable
    )
    with pytest.raises(RunError, match="not one of the 1 images"):
        list(in_order(found.train.part(place, place + 1), 4))
    tokens = encode(RunEncoder(trained, for_predictor=True), found.train)
    assert len(tokens.labels) == 6
    # Cached tokens have the same rows in the same batches as the images.
    cached_columns = Steps((cached(found.train, Tokens(tokens)),), np.zeros(1, np.int64), 7, 0).rows(
        np.arange(7)
    )
    for name in ("labels", "weight"):
        np.testing.assert_array_equal(cached_columns[name], columns[name])
    assert not cached_columns["inputs"][columns["weight"] == 0].any()
    assert sum(len(drawn.labels) for drawn in in_order(cached(found.train, Tokens(tokens)), 1)) == 6


def test_what_tokens_lack_is_noted_once(task, tmp_path):
    """Torn then or torn now: what is trained on them does without it."""
    quarantine = Quarantine(tmp_path / "notes" / "train.jsonl")
    rows = replace(task.train.part(0, 6), quarantine=quarantine)
    nothing = np.zeros(0, np.int64)
    found = Features(np.zeros((4, 1, 1), np.float32), nothing, rows.samples[[0, 1, 3, 5]], (), "")
    for _ in range(2):
        note_missing(rows, found)
        assert len(quarantine.file.read_text().splitlines()) == 2
    expected = {rows.index.row_id(int(rows.samples[i])) for i in (2, 4)}
    assert {record["row_id"] for record in quarantine.records()} == expected
    assert all("when its tokens were made" in record["reason"] for record in quarantine.records())
    assert len(rows.judged_labels) == 4


def test_choices_are_fixed_and_a_smaller_one_begins_the_larger(trained, config, task, tmp_path):
    fewer = config.model_copy(update={"data": config.data.model_copy(update={"num_train": 10})})
    (again,) = open_tasks(fewer, trained.config, tmp_path)
    assert again.train.samples.tolist() == task.train.samples[:10].tolist()
    assert len(set(task.train.samples.tolist())) == 40
