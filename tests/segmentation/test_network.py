from copy import deepcopy

import numpy as np
import pytest
import torch

from iwm_ray.finetuning.model import weights_hash
from iwm_ray.segmentation.data import IGNORED
from iwm_ray.segmentation.network import TASK, assemble, count_pixels, logits, pixel_loss, spread_positions
from iwm_ray.segmentation.settings import SegmentConfig
from iwm_ray.trained import Trained


@pytest.fixture(scope="module")
def trained(clean_run):
    return Trained.open(clean_run)


@pytest.fixture(scope="module")
def model(trained):
    return trained.load()


def test_spreading_to_the_same_grid_changes_nothing(model):
    encoder, predictor = deepcopy(model.encoder), deepcopy(model.predictor)
    spread_positions(encoder, predictor, encoder.grid[0])
    assert weights_hash(encoder) == weights_hash(model.encoder)
    assert weights_hash(predictor) == weights_hash(model.predictor)


def test_larger_images_have_more_patches_and_logits_of_their_size(trained, model):
    config = SegmentConfig(image_size=64)
    tuned = assemble(trained, model, config, "predictor", "pretrained", 5, 0).eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert tuned.encode(images).shape[1] == 64
    assert logits(tuned, images, trained.policy.action_dim, 64).shape == (2, 5, 64, 64)
    assert model.encoder.grid == (4, 4)


def test_the_control_has_the_same_head_and_another_predictor(trained, model):
    ours, control = (
        assemble(trained, model, SegmentConfig(), "predictor", start, 5, 3)
        for start in ("pretrained", "random")
    )
    assert weights_hash(ours.head(TASK)) == weights_hash(control.head(TASK))
    assert weights_hash(ours.encoder) == weights_hash(control.encoder)
    assert weights_hash(ours.predictor) != weights_hash(control.predictor)
    assert ours.num_trained == control.num_trained


def test_ignored_pixels_have_no_part_in_the_loss():
    predicted, classes = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    classes[0, :2] = IGNORED
    other = predicted.clone()
    other[0, :, :2] += torch.randn(3, 2, 4)
    assert pixel_loss(predicted, classes) == pixel_loss(other, classes)
    counted = [
        (predicted[i, :, r, c], classes[i, r, c]) for i, r, c in (classes != IGNORED).nonzero().tolist()
    ]
    slow = np.mean([float(torch.logsumexp(scores, 0) - scores[label]) for scores, label in counted])
    assert float(pixel_loss(predicted, classes)) == pytest.approx(slow * len(counted), rel=1e-5)
    assert float(pixel_loss(predicted, torch.full_like(classes, IGNORED))) == 0


def test_pixels_are_counted_as_one_would_by_hand():
    predicted, classes = np.array([[0, 1, 2], [2, 1, 0]]), np.array([[0, 1, 1], [IGNORED, 0, 0]])
    assert count_pixels(predicted, classes, 3).tolist() == [[2, 1, 0], [2, 2, 1], [3, 2, 0]]
