"""k nearest neighbours on frozen features: how well classes lie together, without training anything."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

_TEMPERATURE = 0.07  # of the votes, as in the kNN protocols of instance discrimination and DINO
_QUERIES_AT_ONCE = 1024  # bounds the table of similarities


@dataclass(frozen=True)
class KnnResult:
    """Accuracy, and the two things that it must be compared with."""

    top1: float
    """share of the queries whose class was found, 0..1"""
    chance: float
    """share of the queries' most frequent class: what the best constant answer scores"""
    uniform: float
    """1 / number of classes in the bank: what blind guessing scores"""


def knn_classes(
    queries: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    num_classes: int,
    num_neighbors: int = 20,
    temperature: float = _TEMPERATURE,
) -> Tensor:
    """The class that the nearest neighbours vote for; a neighbour of cosine s has exp(s / temperature) votes.

    Args:
        queries: `[q d]` features.
        bank: `[m d]` features of other images than the queries.
        bank_labels: `[m]` int64 in 0..num_classes-1.
        num_classes: how many classes there are.
        num_neighbors: k; at most m of them vote.
        temperature: the smaller, the more the nearest decide.

    Returns:
        `[q]` int64, without waiting for the device.
    """
    num_neighbors = min(num_neighbors, len(bank))
    # In float64, which autocast leaves alone: bfloat16 keeps three digits of a cosine.
    queries, bank = (F.normalize(features.double(), dim=1) for features in (queries, bank))
    classes = []
    for part in queries.split(_QUERIES_AT_ONCE):
        similarity, neighbors = (part @ bank.T).topk(num_neighbors, dim=1)
        # Relative to the nearest, so that no temperature overflows.
        votes = ((similarity - similarity[:, :1]) / temperature).exp()
        tally = votes.new_zeros(len(part), num_classes).scatter_add_(1, bank_labels[neighbors], votes)
        classes.append(tally.argmax(1))
    return torch.cat(classes)


def knn_accuracy(
    queries: Tensor,
    query_labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    num_neighbors: int = 20,
    temperature: float = _TEMPERATURE,
) -> KnnResult:
    """Top-1 of `knn_classes`; rows with label -1 (unlabelled) take no part.

    Args:
        queries: `[q d]`; query_labels: `[q]` integers.
        bank: `[m d]`; bank_labels: `[m]` integers.
        num_neighbors: k, at most m.
        temperature: see `knn_classes`.

    Raises:
        ValueError: no labelled query or no labelled bank image.
    """
    queries, query_labels = queries[query_labels >= 0], query_labels[query_labels >= 0]
    bank, bank_labels = bank[bank_labels >= 0], bank_labels[bank_labels >= 0]
    if not len(queries) or not len(bank):
        raise ValueError(
            f"kNN needs labels: {len(queries)} labelled queries, {len(bank)} labelled bank images"
        )
    num_classes = int(torch.cat([query_labels, bank_labels]).max()) + 1
    found = knn_classes(queries, bank, bank_labels.long(), num_classes, num_neighbors, temperature)
    return KnnResult(
        top1=float((found == query_labels).double().mean()),
        chance=best_constant(query_labels),
        uniform=1 / len(bank_labels.unique()),
    )


def best_constant(labels: Tensor) -> float:
    """The share of the most frequent class in `[q]` labels of 0 and more."""
    return float(labels.long().bincount().max()) / len(labels)
