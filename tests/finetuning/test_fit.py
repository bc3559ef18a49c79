import math
from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import pytest
import torch

from iwm_ray.evaluation.encoders import RunEncoder
from iwm_ray.finetuning.classification import ClassObjective, measure
from iwm_ray.finetuning.data import Steps, TokenRows, Tokens, encode
from iwm_ray.finetuning.fit import ArmRecord, Between, DivergedError, Memory, TuneState, fit, rate_share
from iwm_ray.finetuning.model import Asking, weights_hash
from iwm_ray.loader import to_tensors
from iwm_ray.run_directory import RunDirectory
from iwm_ray.training import metrics_log
from iwm_ray.workers import Worker

WORKER = Worker(0, 1, torch.device("cpu"))


def test_the_rate_rises_and_falls_to_zero():
    shares = [rate_share(step, 100, 0.1) for step in range(100)]
    assert all(earlier < later for earlier, later in pairwise(shares[:11]))
    assert max(shares) == pytest.approx(1)
    assert all(earlier >= later for earlier, later in pairwise(shares[10:]))
    assert shares[-1] < 1e-3 and rate_share(55, 100, 0.1) == pytest.approx(0.5)
    assert rate_share(0, 1, 0.0) == 1


@pytest.fixture
def train(trained, tmp_path):
    """Trains a network on a split; gives what it cost and the lines of its log."""

    def make(tuned, split, config, num_steps, lr=3e-3):
        schedule, run = np.zeros(num_steps, np.int64), RunDirectory(tmp_path / str(np.random.rand()))
        run.path.mkdir()
        steps = Steps((split,), schedule, config.batch_size, 0)
        size, asking = config.batch_size, Asking(trained.policy, 16)
        objective = ClassObjective(("photos",), (10,), schedule, size, asking, config, 0)
        record = ArmRecord(tuning="test", arm="arm")
        state = TuneState.start(tuned, config, "pretrained", lr, record, num_steps)
        between = Between(run, run, WORKER, state, size, 1, lambda: None)
        batches = (to_tensors(steps.rows(np.arange(at * size, at * size + size))) for at in range(num_steps))
        fit(state, batches, objective, tuned, WORKER, between)
        return between.fitted(state), metrics_log.read(run.metrics)

    return make


def test_it_learns_and_leaves_the_encoder_alone(tuned_network, config, trained, model, task, train):
    tokens = Tokens(encode(RunEncoder(trained, for_predictor=True), task.train))
    rows = TokenRows(task.train.samples, task.train.labels, tokens)
    tuned, asking = tuned_network(config), Asking(trained.policy, 16)
    frozen, predictor = weights_hash(tuned.encoder), weights_hash(tuned.predictor)
    before = measure(tuned, "photos", rows, asking, 7, nullcontext).mean()
    fitted, lines = train(tuned, rows, config, 60, lr=1e-2)
    after = measure(tuned, "photos", rows, asking, 7, nullcontext).mean()
    assert after > before + 0.3
    assert fitted.loss < math.log(10) - 0.8
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60] and fitted.num_images == 60 * 16
    assert fitted.peak_memory > 0 and fitted.seconds > 0
    assert weights_hash(tuned.encoder) == frozen == weights_hash(model.target_encoder)
    assert weights_hash(tuned.predictor) != predictor


def test_the_same_seed_gives_the_same_bits_from_images_too(tuned_network, config, task, train):
    config = config.model_copy(update={"drop_path": 0.5})
    hashes = []
    for number in range(2):
        tuned = tuned_network(config, "both")
        torch.manual_seed(number)  # what others draw has no part in it
        train(tuned, task.train, config, 3)
        hashes.append(weights_hash(tuned))
    assert hashes[0] == hashes[1]


def test_parts_of_a_batch_are_the_batch(tuned_network, config, task, train):
    networks = []
    for parts in (1, 4):
        runtime = config.runtime.model_copy(update={"accumulation_steps": parts})
        networks.append(tuned_network(config, "both"))
        train(networks[-1], task.train, config.model_copy(update={"runtime": runtime}), 3)
    one, other = (network.state_dict() for network in networks)
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-5


def test_measuring_does_not_depend_on_the_size_of_its_batches(tuned_network, config, trained, task):
    tokens = Tokens(encode(RunEncoder(trained, for_predictor=True), task.test))
    rows = TokenRows(task.test.samples, task.test.labels, tokens)
    tuned, asking = tuned_network(config), Asking(trained.policy, 16)
    small, large = (measure(tuned, "photos", rows, asking, size, nullcontext) for size in (3, 64))
    assert small.shape == (len(rows),) and np.array_equal(small, large)


def test_a_loss_that_is_not_finite_ends_the_arm(tuned_network, config, trained, task, train):
    tuned = tuned_network(config)
    with torch.no_grad():
        tuned.head("photos").classify.weight.fill_(torch.inf)
    tokens = Tokens(encode(RunEncoder(trained, for_predictor=True), task.train))
    rows = TokenRows(task.train.samples, task.train.labels, tokens)
    with pytest.raises(DivergedError, match="at --lr 0.003; lower it"):
        train(tuned, rows, config, 3)


def test_memory_is_that_of_the_arm_whatever_ran_before(tuned_network, config, task, train):
    """Parameters, gradients, moments; activations grow with the batch, by as much for every image."""
    needed = []
    for tune, size in (
        ("predictor", 8),
        ("predictor", 16),
        ("predictor", 24),
        ("both", 16),
        ("predictor", 16),
    ):
        tuned = tuned_network(config, tune)
        fitted, _ = train(tuned, task.train, config.model_copy(update={"batch_size": size}), 2)
        own = 4 * sum(parameter.numel() for parameter in tuned.parameters()) + 12 * tuned.num_trained
        needed.append(fitted.peak_memory - own)
    small, middle, large, both, again = needed
    assert again == middle < both
    assert 0 < small < middle < large and large - middle == pytest.approx(middle - small, rel=0.01)


def test_what_is_saved_for_the_backward_pass_is_counted_once():
    """Of one layer and a square: the input, and the layer's output, which a view shares."""
    layer, inputs = torch.nn.Linear(5, 7, bias=False), torch.ones(3, 5)
    memory = Memory(torch.device("cpu"))
    with memory.watch(layer):
        output = layer(inputs)
        (output.flatten() * output.view(-1)).sum().backward()
    assert memory.peak() == 4 * (35 + 3 * 35 + 3 * 5 + 3 * 7)
