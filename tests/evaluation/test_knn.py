import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from iwm_ray.evaluation.knn import knn_accuracy, knn_classes


def _clusters(
    seed: int, num: int, num_classes: int = 5, width: int = 12
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(num_classes, (num,), generator=generator)
    return centres[labels] + 1.5 * torch.randn(num, width, generator=generator), labels


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_neighbors=st.integers(1, 30),
    temperature=st.sampled_from([0.03, 0.07, 1.0]),
)
def test_agrees_with_scikit_learn(seed: int, num_neighbors: int, temperature: float) -> None:
    bank, bank_labels = _clusters(seed, 80)
    queries, _ = _clusters(seed + 1, 40)
    peer = KNeighborsClassifier(
        num_neighbors, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(bank.double().numpy(), bank_labels.numpy())
    shares = peer.predict_proba(queries.double().numpy())
    ours = knn_classes(queries, bank, bank_labels, 5, num_neighbors, temperature).numpy()
    clear = np.sort(shares, 1)[:, -1] - np.sort(shares, 1)[:, -2] > 1e-4  # a draw may fall either way
    assert clear.mean() > 0.8
    assert (peer.classes_[shares.argmax(1)] == ours)[clear].all()


def test_separable_classes_are_found_and_chance_is_the_best_constant_answer() -> None:
    bank, bank_labels = torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4)
    queries, labels = torch.eye(3)[[0, 0, 0, 1]], torch.tensor([0, 0, 0, 1])
    result = knn_accuracy(queries, labels, bank, bank_labels, num_neighbors=3)
    assert (result.top1, result.chance, result.uniform) == (1.0, 0.75, pytest.approx(1 / 3))


def test_more_neighbours_than_the_bank_holds_are_clipped() -> None:
    bank, bank_labels = torch.eye(3), torch.arange(3)
    assert knn_accuracy(torch.eye(3), bank_labels, bank, bank_labels, num_neighbors=1000).top1 == 1.0


def test_unlabelled_rows_take_no_part() -> None:
    bank, bank_labels = _clusters(0, 60)
    queries, labels = _clusters(1, 30)
    expected = knn_accuracy(queries, labels, bank, bank_labels)
    strays = torch.full((10, 12), 3.0)
    none = torch.full((10,), -1)
    found = knn_accuracy(
        torch.cat([strays, queries]),
        torch.cat([none, labels]),
        torch.cat([bank, strays]),
        torch.cat([bank_labels, none]),
    )
    assert found == expected


def test_without_labels_it_says_so() -> None:
    with pytest.raises(ValueError, match="0 labelled queries"):
        knn_accuracy(torch.eye(2), torch.tensor([-1, -1]), torch.eye(2), torch.tensor([0, 1]))


def test_a_tiny_temperature_does_not_overflow() -> None:
    bank, bank_labels = _clusters(0, 60)
    nearest_only = knn_classes(bank[:5], bank, bank_labels, 5, num_neighbors=10, temperature=1e-4)
    assert nearest_only.tolist() == bank_labels[:5].tolist()


def test_autocast_does_not_blunt_the_cosines() -> None:
    bank, bank_labels = _clusters(0, 60)
    queries, _ = _clusters(1, 30)
    expected = knn_classes(queries, bank, bank_labels, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(knn_classes(queries, bank, bank_labels, 5), expected)
