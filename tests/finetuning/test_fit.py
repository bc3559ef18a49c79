import math
from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import pytest
import torch

from iwm_ray.errors import RunError
from iwm_ray.evaluation.encoders import RunEncoder
from iwm_ray.finetuning.data import Steps, TokenRows, encode
from iwm_ray.finetuning.fit import fit, measure, rate_share
from iwm_ray.finetuning.model import Asking, weights_hash


def test_the_rate_rises_and_falls_to_zero():
    shares = [rate_share(step, 100, 0.1) for step in range(100)]
    assert all(earlier < later for earlier, later in pairwise(shares[:11]))
    assert max(shares) == pytest.approx(1)
    assert all(earlier >= later for earlier, later in pairwise(shares[10:]))
    assert shares[-1] < 1e-3 and rate_share(55, 100, 0.1) == pytest.approx(0.5)
    assert rate_share(0, 1, 0.0) == 1


def trained_arm(tuned, rows, config, trained, num_steps, lr=3e-3, seed=0):
    losses = []
    steps = Steps((rows,), np.zeros(num_steps, np.int64), config.batch_size, seed)
    fitted = fit(
        tuned, ["photos"], steps.batches(0), num_steps, config, "pretrained", lr, Asking(trained.policy, 16), seed,
        lambda done, images, loss: losses.append((done, images, loss)), nullcontext,
    )  # fmt: skip
    return fitted, losses


def test_it_learns_and_leaves_the_encoder_alone(tuned_network, config, trained, model, task):
    rows = TokenRows(encode(RunEncoder(trained, for_predictor=True), task.train))
    tuned, asking = tuned_network(config), Asking(trained.policy, 16)
    frozen, predictor = weights_hash(tuned.encoder), weights_hash(tuned.predictor)
    before = measure(tuned, "photos", rows, asking, 7, nullcontext).mean()
    fitted, losses = trained_arm(tuned, rows, config, trained, 60, lr=1e-2)
    after = measure(tuned, "photos", rows, asking, 7, nullcontext).mean()
    assert after > before + 0.3
    assert fitted.loss < math.log(10) - 0.8
    assert losses[-1][:2] == (60, fitted.num_images) == (60, 60 * 16)
    assert fitted.peak_memory > 0 and fitted.seconds > 0
    assert weights_hash(tuned.encoder) == frozen == weights_hash(model.target_encoder)
    assert weights_hash(tuned.predictor) != predictor


def test_the_same_seed_gives_the_same_bits_from_images_too(tuned_network, config, trained, task):
    config = config.model_copy(update={"drop_path": 0.5})
    hashes = []
    for _ in range(2):
        tuned = tuned_network(config, "both")
        torch.manual_seed(0)
        trained_arm(tuned, task.train, config, trained, 3)
        hashes.append(weights_hash(tuned))
    assert hashes[0] == hashes[1]


def test_measuring_does_not_depend_on_the_size_of_its_batches(tuned_network, config, trained, task):
    rows = TokenRows(encode(RunEncoder(trained, for_predictor=True), task.test))
    tuned, asking = tuned_network(config), Asking(trained.policy, 16)
    small, large = (measure(tuned, "photos", rows, asking, size, nullcontext) for size in (3, 64))
    assert small.shape == (len(rows),) and np.array_equal(small, large)


def test_a_loss_that_is_not_finite_ends_the_arm(tuned_network, config, trained, task):
    tuned = tuned_network(config)
    with torch.no_grad():
        tuned.head("photos").classify.weight.fill_(torch.inf)
    rows = TokenRows(encode(RunEncoder(trained, for_predictor=True), task.train))
    with pytest.raises(RunError, match="lower --lr"):
        trained_arm(tuned, rows, config, trained, 3)
