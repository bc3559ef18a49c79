import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch.optim import SGD

from iwm_ray.data.plan import permute
from iwm_ray.errors import UsageError
from iwm_ray.evaluation import probes
from iwm_ray.evaluation.features import Features
from iwm_ray.evaluation.knn import knn_accuracy
from iwm_ray.evaluation.probes import (
    Grid,
    attentive_probe,
    knn_probe,
    linear_probe,
    low_shot_probe,
    wilson,
)
from iwm_ray.model.heads import LinearHead

QUICK = Grid((0.003, 0.03), (0.01, 0.0), epochs=3, min_steps=60, batch_size=32)
QUICK_ATTENTIVE = Grid((1e-3, 1e-2), (0.01,), epochs=3, min_steps=120, batch_size=32)


def features(values, labels, names=None):
    labels = np.asarray(labels, np.int64)
    names = names or tuple(f"class {number}" for number in range(labels.max(initial=0) + 1))
    return Features(np.asarray(values, np.float32), labels, np.arange(len(labels)), names, "test")


def clouds(seed, count, num_classes=4, width=8, distance=1.0):
    """Classes around centres of their own, one after the other."""
    centres = np.random.default_rng(99).standard_normal((num_classes, width)) * distance
    labels = np.arange(count) % num_classes
    return features(centres[labels] + np.random.default_rng(seed).standard_normal((count, width)), labels)


def token_clouds(seed, count, distance=1.0):
    """Five tokens, all of which tell the class."""
    plain = clouds(seed, count, distance=distance)
    noise = np.random.default_rng(seed + 1).standard_normal((count, 5, 8))
    return features((plain.values[:, None] + 0.3 * noise).astype(np.float16), plain.labels)


def marked_clouds(seed, count):
    """Five tokens of random classes; the one whose last channel is high tells the image's class."""
    generator = np.random.default_rng(seed)
    labels, told = np.arange(count) % 4, generator.integers(0, 4, (count, 5))
    marked = generator.integers(0, 5, count)
    told[np.arange(count), marked] = labels
    tokens = np.full((count, 5, 8), -2.0)
    tokens[..., :4] = 3 * np.eye(4)[told]
    tokens[np.arange(count), marked, 7] = 2.0
    return features(tokens + 0.2 * generator.standard_normal(tokens.shape), labels)


@pytest.fixture(scope="module")
def digits():
    values, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return [features(values[rows], labels[rows]) for rows in (order[:1200], order[1200:])]


# The linear probe


def test_the_linear_probe_is_as_good_as_scikit_learns(digits):
    """Both choose among regularisations by training images alone; the tolerance is one standard error of an accuracy
    of 0.97 on these 597 images, doubled."""
    train, test = digits
    scale = StandardScaler().fit(train.values)
    known, asked = scale.transform(train.values), scale.transform(test.values)
    peers = [
        LogisticRegression(C=c, max_iter=2000).fit(known[:1000], train.labels[:1000])
        for c in (0.01, 0.1, 1, 10)
    ]
    best = max(peers, key=lambda peer: peer.score(known[1000:], train.labels[1000:]))
    peer = LogisticRegression(C=best.C, max_iter=500).fit(known, train.labels).score(asked, test.labels)
    ours = linear_probe(train, test).metrics
    assert abs(ours["linear/top1"] - peer) < 2 * math.sqrt(0.97 * 0.03 / 597)
    assert ours["linear/top1_low"] < ours["linear/top1"] < ours["linear/top1_high"]


def test_heads_side_by_side_are_the_heads_alone():
    """Against LinearHead and torch's SGD, one head after the other, on the same batches."""
    data = clouds(0, 150)
    labelled = probes._labelled(data, "data.path")
    together = probes._learn(
        probes._linear_heads, 4, labelled, QUICK, QUICK.settings, 0, torch.device("cpu"), lambda: None
    )
    num_steps = QUICK.num_steps(150)
    for number, (learning_rate, weight_decay) in enumerate(QUICK.settings):
        head = LinearHead(8, 4).eval()
        values = torch.from_numpy(data.values)
        head.norm.running_mean, head.norm.running_var = values.mean(0), values.var(0, correction=0)
        torch.nn.init.zeros_(head.classify.weight)
        groups = [
            {"params": [head.classify.weight], "weight_decay": weight_decay},
            {"params": [head.classify.bias]},
        ]
        optimizer = SGD(groups, lr=1.0, momentum=0.9)
        rows = probes._orders(labelled, QUICK, num_steps, probes.key(0, "probe order"))
        for step, batch in enumerate(rows):
            optimizer.zero_grad()
            F.cross_entropy(head(values[batch]), torch.from_numpy(data.labels[batch])).backward()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * probes._rate(step, num_steps, QUICK.warmup)
            optimizer.step()
        assert step == num_steps - 1
        torch.testing.assert_close(together(values)[:, number], head(values), rtol=1e-3, atol=1e-4)


def test_every_image_is_seen_once_an_epoch():
    labelled = probes._labelled(clouds(0, 70), "data.path")
    num_steps = QUICK.num_steps(70)
    assert num_steps % 3 == 0
    assert num_steps >= QUICK.min_steps
    batches = list(probes._orders(labelled, QUICK, num_steps, 5))
    assert len(batches) == num_steps
    orders = [np.concatenate(batches[first : first + 3]) for first in range(0, num_steps, 3)]
    assert all(sorted(order) == list(range(70)) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)


# All probes


def run(probe, train, test, **options):
    if probe == "knn":
        return knn_probe(train, test)
    grid = options.pop("grid", QUICK_ATTENTIVE if probe == "attentive" else QUICK)
    if probe == "lowshot10":
        return low_shot_probe(train, test, 10, grid=grid, num_subsets=3, **options)
    return {"linear": linear_probe, "attentive": attentive_probe}[probe](train, test, grid=grid, **options)


PROBES = ["linear", "attentive", "lowshot10", "knn"]


def data_for(probe, seed, count, distance):
    return (token_clouds if probe == "attentive" else clouds)(seed, count, distance=distance)


@pytest.mark.parametrize("probe", PROBES)
def test_separable_classes_are_all_found(probe):
    train, test = (data_for(probe, seed, count, 20.0) for seed, count in ((1, 300), (2, 101)))
    metrics = run(probe, train, test).metrics
    assert metrics[f"{probe}/top1"] == 1
    assert metrics[f"{probe}/chance"] == 26 / 101


@pytest.mark.parametrize("probe", ["linear", "attentive", "knn"])
def test_labels_without_meaning_give_chance_within_the_interval(probe):
    train, test = (data_for(probe, seed, count, 0.0) for seed, count in ((1, 300), (2, 400)))
    metrics = run(probe, train, test).metrics
    assert metrics[f"{probe}/top1_low"] < 0.25 < metrics[f"{probe}/top1_high"]


@pytest.mark.parametrize("probe", ["linear", "attentive"])
def test_the_winner_is_chosen_without_the_test_images(probe):
    train, test = (data_for(probe, seed, count, 0.7) for seed, count in ((1, 300), (2, 100)))
    shuffled = replace(test, labels=np.random.default_rng(0).permutation(test.labels))
    fair, unfair = run(probe, train, test), run(probe, train, shuffled)
    assert fair.heads == unfair.heads
    assert fair.chosen == unfair.chosen
    assert fair.metrics[f"{probe}/top1"] > unfair.metrics[f"{probe}/top1"]


def test_the_winner_is_the_best_on_held_out_training_images():
    """Learning rates of which only one can learn anything."""
    train, test = clouds(1, 300, distance=2.0), clouds(2, 100, distance=2.0)
    grid = replace(QUICK, learning_rates=(0.0, 0.03, -0.03), weight_decays=(0.0,))
    found = linear_probe(train, test, grid=grid)
    assert len(found.heads) == 3
    assert found.chosen == found.heads[1]
    assert found.chosen.learning_rate == 0.03
    assert found.chosen.held_out_top1 == max(head.held_out_top1 for head in found.heads)
    assert found.metrics["linear/top1"] > 0.8


def test_equally_good_heads_are_told_apart_by_their_loss():
    heads = [
        probes.TriedHead(0.1, 0.0, 0.5, 2.0),
        probes.TriedHead(0.2, 0.0, 0.5, 1.0),
        probes.TriedHead(0.3, 0.0, 0.4, 0.1),
        probes.TriedHead(0.4, 0.0, 0.5, math.nan),
    ]
    assert max(heads, key=probes._quality) == heads[1]


@pytest.mark.parametrize("probe", PROBES)
def test_the_same_seed_gives_the_same_bits(probe):
    train, test = (data_for(probe, seed, count, 0.7) for seed, count in ((1, 200), (2, 100)))
    options = {} if probe == "knn" else {"seed": 3}
    first = run(probe, train, test, **options)
    torch.manual_seed(12345)
    assert run(probe, train, test, **options) == first
    if probe != "knn":
        assert run(probe, train, test, seed=4).heads != first.heads


def test_unlabelled_images_take_no_part():
    train, test = clouds(1, 200, distance=2.0), clouds(2, 100, distance=2.0)
    strays = np.full((50, 8), 1e6, np.float32)

    def with_strays(data):
        labels = np.concatenate([np.full(50, -1), data.labels])
        return features(np.concatenate([strays, data.values]), labels, data.class_names)

    for probe in ("linear", "knn"):
        assert run(probe, with_strays(train), with_strays(test)) == run(probe, train, test)


def test_classes_are_matched_by_name():
    train, test = clouds(1, 200, distance=20.0), clouds(2, 100, distance=20.0)
    turned = replace(test, labels=3 - test.labels, class_names=test.class_names[::-1])
    assert run("linear", train, turned) == run("linear", train, test)


def test_tokens_are_pooled_for_the_linear_probe():
    train, test = token_clouds(1, 200, distance=3.0), token_clouds(2, 100, distance=3.0)
    pooled = [features(data.values.astype(np.float32).mean(1), data.labels) for data in (train, test)]
    assert run("linear", train, test).chosen == run("linear", *pooled).chosen
    assert run("knn", train, test).metrics == pytest.approx(run("knn", *pooled).metrics, abs=0.011)


def test_knn_is_that_of_the_monitors():
    train, test = clouds(1, 200), clouds(2, 100)
    tensors = [torch.from_numpy(part) for data in (test, train) for part in (data.values, data.labels)]
    assert run("knn", train, test).metrics["knn/top1"] == pytest.approx(knn_accuracy(*tensors).top1)


def test_attention_picks_out_the_token_that_counts():
    train, test = marked_clouds(1, 400), marked_clouds(2, 200)
    grid = replace(QUICK_ATTENTIVE, learning_rates=(1e-2,), min_steps=300)
    assert run("attentive", train, test, grid=grid).metrics["attentive/top1"] > 0.95
    assert run("linear", train, test).metrics["linear/top1"] < 0.8  # what a mean blurs


def test_the_attentive_probe_needs_tokens():
    with pytest.raises(ValueError, match="needs tokens"):
        attentive_probe(clouds(1, 100), clouds(2, 100))


def test_progress_counts_every_step():
    counts = []
    linear_probe(clouds(1, 100), clouds(2, 50), grid=QUICK, progress=lambda *count: counts.append(count))
    assert counts[-1][0] == counts[-1][1] == len(counts)
    assert [done for done, _ in counts] == list(range(1, len(counts) + 1))


# Few labels


@settings(max_examples=30, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    share=st.floats(0.001, 0.99),
    seed=st.integers(0, 2**40),
)
def test_a_split_takes_its_share_of_every_class(labels, share, seed):
    labels = np.array(labels)
    few, rest = probes._split(labels, share, seed, most=False)
    held_out, kept = probes._split(labels, share, seed, most=True)
    for taken, left in ((few, rest), (held_out, kept)):
        assert sorted([*taken, *left]) == list(range(len(labels)))
    for number in np.unique(labels):
        count = int((labels == number).sum())
        assert (labels[few] == number).sum() == max(1, round(share * count))
        assert (labels[held_out] == number).sum() == min(max(1, round(share * count)), count - 1)


def test_a_low_shot_probe_learns_from_few_images_only(monkeypatch):
    train, test = clouds(1, 400), clouds(2, 100)
    seen = []
    learn = probes._learn
    monkeypatch.setattr(probes, "_learn", lambda *args: seen.append(args[2].rows) or learn(*args))
    found = low_shot_probe(train, test, 10, grid=QUICK, num_subsets=3)
    whole = seen[1::2]  # first the grid without its held-out images, then the winner on all
    assert [len(rows) for rows in whole] == [40, 40, 40]
    assert len({tuple(rows) for rows in whole}) == 3
    assert all(set(part) < set(rows) for part, rows in zip(seen[::2], whole, strict=True))
    assert len(found.heads) == 3 * len(QUICK.settings)
    assert found.metrics.keys() == {"lowshot10/top1", "lowshot10/top1_std", "lowshot10/chance"}
    assert found.metrics["lowshot10/top1_std"] > 0


def test_one_image_a_class_leaves_nothing_to_choose_by():
    train, test = clouds(1, 40, distance=20.0), clouds(2, 100, distance=20.0)
    found = low_shot_probe(train, test, 1, grid=QUICK, num_subsets=2)
    assert all(math.isnan(head.held_out_top1) for head in found.heads)
    assert found.metrics["lowshot1/top1"] == 1


# Intervals, and what is refused


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 500), share=st.floats(0, 1))
def test_the_interval_is_wilsons(count, share):
    successes = round(share * count)
    expected = binomtest(successes, count).proportion_ci(method="wilson")
    assert wilson(successes, count) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_a_constant_channel_does_not_blow_up():
    train, test = clouds(1, 200, distance=20.0), clouds(2, 100, distance=20.0)
    for data in (train, test):
        data.values[:, 0] = 7.3
    test.values[:50, 0] = 9.0
    assert run("linear", train, test).metrics["linear/top1"] == 1


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda train, test: (replace(train, labels=np.full(40, -1)), test),
            "data.path: none of the 40 images",
        ),
        (
            lambda train, test: (train, replace(test, labels=np.full(20, -1))),
            "data.test_path: none of the 20",
        ),
        (
            lambda train, test: (replace(train, labels=np.full(40, 2)), test),
            "are of class class 2; a probe needs",
        ),
        (
            lambda train, test: (train, replace(test, class_names=("class 0", "class 1", "class 2", "cat"))),
            "data.test_path: class cat is not among the training images",
        ),
        (
            lambda train, test: (replace(train, class_names=tuple(f"class {n}" for n in range(50))), test),
            "40 labelled images are fewer than its 50 classes",
        ),
    ],
)
def test_data_that_no_probe_can_use_is_refused_in_one_line(probe, change, words):
    train, test = change(*(data_for(probe, seed, count, 1.0) for seed, count in ((1, 40), (2, 20))))
    with pytest.raises(UsageError) as raised:
        run(probe, train, test)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_features_of_two_encoders_are_a_mistake():
    with pytest.raises(ValueError, match="two kinds"):
        linear_probe(clouds(1, 40), clouds(2, 40, width=9))


def test_orders_are_those_of_the_project():
    labelled = probes._labelled(clouds(0, 70), "data.path")
    first = np.concatenate(list(probes._orders(labelled, QUICK, 3, 5)))
    np.testing.assert_array_equal(first, permute(5, 0, np.arange(70), 70))
