"""How much of the classes a simple head finds in frozen features: linear, attentive, few-label probes and kNN.

Learning rate and weight decay decide much of a probe's figure, so many heads with their own rates learn side by side in
one pass over the features. The winner is chosen on a held-out part of the training images; its rates are then used once
more on all of them, and what comes out answers for the test images, which nothing else looks at (METHOD, section 5).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import AdamW

from iwm_ray.data.plan import permute
from iwm_ray.errors import UsageError
from iwm_ray.evaluation.features import Features, key
from iwm_ray.evaluation.knn import best_constant, knn_classes
from iwm_ray.model.heads import AttentiveHead
from iwm_ray.training.optimizer import is_decayed

Settings = Sequence[tuple[float, float]]
"""learning rate and weight decay of each head"""
Progress = Callable[[int, int], None]
"""gets how many optimizer steps are done, and of how many"""

_IMAGES_AT_ONCE = 2048  # where no gradient is needed
_HEAD_CHANNELS = 64  # of each attention head of the attentive probe, as in ViT
_CONSTANT = 1e-9  # variance of a channel that counts as constant, as a share of its mean square
_MOMENTUM = 0.9
_NORMAL_95 = 1.959964  # standard deviations to either side


@dataclass(frozen=True)
class Grid:
    """Which heads are tried, and how they learn: a short warm-up, then a cosine to zero."""

    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...]
    """of the weights, not of biases: linear heads take it as an L2 term, attentive ones as AdamW does"""
    epochs: int
    """passes over the training images"""
    min_steps: int
    """optimizer steps at least: few images are passed over more often"""
    batch_size: int = 256
    held_out: float = 0.1
    """share of each class on which the winner is chosen; at least one image of every class that has two"""
    warmup: float = 0.05
    """share of the steps in which the learning rate rises"""

    @property
    def settings(self) -> list[tuple[float, float]]:
        """(learning rate, weight decay) of every head."""
        return list(product(self.learning_rates, self.weight_decays))

    def num_steps(self, num_images: int) -> int:
        """Optimizer steps on so many training images."""
        by_epoch = -(-num_images // self.batch_size)
        return max(self.epochs, -(-self.min_steps // by_epoch)) * by_epoch


LINEAR = Grid((3e-3, 1e-2, 3e-2, 1e-1, 3e-1), (1e-2, 1e-3, 1e-4, 0.0), epochs=30, min_steps=1000)
ATTENTIVE = Grid((3e-4, 1e-3, 3e-3), (0.01, 0.3), epochs=20, min_steps=500)
# So few images that one in ten would be no sample to choose by.
LOW_SHOT = replace(LINEAR, held_out=0.3, min_steps=500)


@dataclass(frozen=True)
class TriedHead:
    """One head of a grid."""

    learning_rate: float
    weight_decay: float
    held_out_top1: float
    """0..1; NaN where nothing could be held out, since no class has two images"""
    held_out_loss: float
    """mean cross-entropy, which decides between equally good heads"""


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found."""

    metrics: dict[str, float]
    """`<probe>/top1` on the test images, `<probe>/top1_low` and `<probe>/top1_high` (95 % interval over test images,
    Wilson), `<probe>/chance` (the best constant answer); 0..1"""
    heads: tuple[TriedHead, ...] = ()
    """all that were tried"""
    chosen: TriedHead | None = None


def linear_probe(
    train: Features,
    test: Features,
    *,
    grid: Grid = LINEAR,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> ProbeResult:
    """A linear classifier on mean-pooled features, each channel brought to mean 0 and spread 1.

    Differs: the statistics of that normalisation are those of all training features, not of a batch; with frozen
    features that is what LinearHead's batch normalisation converges to.

    Args:
        train: pooled features or tokens of labelled images; rows without a label take no part.
        test: of other images, by the same encoder; classes are matched by name.
        grid: the heads.
        seed: of held-out images, order and first weights; the same seed gives the same bits.
        device: where the heads learn.
        progress: called after every step.

    Returns:
        metrics named `linear/...`.

    Raises:
        UsageError: no labels, one class only, fewer images than classes, a test class that training lacks.
    """
    task = _Task.of(train, test)
    result, correct = _probe(task, task.train, _linear_heads, grid, seed, torch.device(device), progress)
    return replace(result, metrics=_metrics("linear", correct, task.test.labels))


def attentive_probe(
    train: Features,
    test: Features,
    *,
    grid: Grid = ATTENTIVE,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> ProbeResult:
    """One learned query that attends to the tokens, and a linear classifier (AttentiveHead).

    Arguments and errors as `linear_probe`, with tokens: metrics are named `attentive/...`.
    """
    if train.values.ndim != 3:
        raise ValueError(f"the attentive probe needs tokens [k n d], not features {train.values.shape}")
    task = _Task.of(train, test)
    result, correct = _probe(task, task.train, _attentive_heads, grid, seed, torch.device(device), progress)
    return replace(result, metrics=_metrics("attentive", correct, task.test.labels))


def low_shot_probe(
    train: Features,
    test: Features,
    percent: float,
    *,
    grid: Grid = LOW_SHOT,
    num_subsets: int = 5,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> ProbeResult:
    """The linear probe with the labels of a few training images, for several choices of these.

    Args:
        percent: of each class's images, rounded, at least one; the winner too is chosen within them.
        num_subsets: choices of images, two or more.
        others: as `linear_probe`.

    Returns:
        `lowshot<percent>/top1`, the mean over the choices, `/top1_std`, their standard deviation, and `/chance`;
        heads are those of all choices.
    """
    task = _Task.of(train, test)
    top1: list[float] = []
    heads: list[TriedHead] = []
    for number in range(num_subsets):
        few, _ = _split(task.train.labels, percent / 100, key(seed, f"low shot {number}"), most=False)
        result, correct = _probe(task, task.train.take(few), _linear_heads, grid, seed, torch.device(device))
        top1.append(float(correct.mean()))
        heads.extend(result.heads)
    name = f"lowshot{percent:g}"
    metrics = {
        f"{name}/top1": float(np.mean(top1)),
        f"{name}/top1_std": float(np.std(top1, ddof=1)),
        f"{name}/chance": best_constant(torch.from_numpy(task.test.labels)),
    }
    return ProbeResult(metrics, tuple(heads))


def knn_probe(
    train: Features, test: Features, *, num_neighbors: int = 20, device: torch.device | str = "cpu"
) -> ProbeResult:
    """k nearest neighbours of the test images among the training images (knn_classes); metrics `knn/...`.

    Errors as `linear_probe`.
    """
    task = _Task.of(train, test)
    queries, bank = (
        torch.cat([_pooled(values) for values, _ in data.in_batches(torch.device(device))])
        for data in (task.test, task.train)
    )
    labels = torch.from_numpy(task.train.labels).to(bank.device)
    found = knn_classes(queries, bank, labels, task.num_classes, num_neighbors).cpu().numpy()
    return ProbeResult(_metrics("knn", found == task.test.labels, task.test.labels))


def wilson(successes: int, count: int) -> tuple[float, float]:
    """Ends of the 95 % interval of a share (Wilson, 1927): good for few samples, and at 0 and 1."""
    share, spread = successes / count, _NORMAL_95**2 / count
    centre, half = share + spread / 2, math.sqrt(spread * (share * (1 - share) + spread / 4))
    return max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread))


def _metrics(probe: str, correct: NDArray[np.bool_], labels: NDArray[np.int64]) -> dict[str, float]:
    low, high = wilson(int(correct.sum()), len(correct))
    return {
        f"{probe}/top1": float(correct.mean()),
        f"{probe}/top1_low": low,
        f"{probe}/top1_high": high,
        f"{probe}/chance": best_constant(torch.from_numpy(labels)),
    }


# Labelled images


@dataclass(frozen=True)
class _Labelled:
    """Rows of features, which may be memory-mapped, and their classes."""

    values: NDArray[Any]
    rows: NDArray[np.int64]
    """`[k]` places in `values`"""
    labels: NDArray[np.int64]
    """`[k]` 0 or more"""

    def take(self, numbers: NDArray[np.int64]) -> "_Labelled":
        return _Labelled(self.values, self.rows[numbers], self.labels[numbers])

    def load(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Float32 features and classes."""
        values = torch.from_numpy(np.asarray(self.values[self.rows]))
        return values.to(device).float(), torch.from_numpy(self.labels).to(device)

    def in_batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, len(self.rows), _IMAGES_AT_ONCE):
            yield self.take(np.arange(first, min(first + _IMAGES_AT_ONCE, len(self.rows)))).load(device)


@dataclass(frozen=True)
class _Task:
    train: _Labelled
    test: _Labelled
    num_classes: int

    @classmethod
    def of(cls, train: Features, test: Features) -> "_Task":
        if train.values.shape[1:] != test.values.shape[1:]:
            raise ValueError(f"features of two kinds: {train.values.shape} and {test.values.shape}")
        learned, asked = _labelled(train, "data.path"), _labelled(test, "data.test_path")
        num_classes, present = len(train.class_names), np.unique(learned.labels)
        if len(learned.labels) < num_classes:
            raise UsageError(
                f"data.path: {len(learned.labels)} labelled images are fewer than its {num_classes} classes; "
                "measure on more of them"
            )
        if len(present) < 2:
            raise UsageError(
                f"data.path: all {len(learned.labels)} images are of class {train.class_names[present[0]]}; "
                "a probe needs two classes or more"
            )
        numbers = {train.class_names[number]: number for number in present}
        unknown = [
            name for name in np.array(test.class_names)[np.unique(asked.labels)] if name not in numbers
        ]
        if unknown:
            raise UsageError(
                f"data.test_path: class {unknown[0]} is not among the training images; give test images of the "
                "training classes, or measure on more training images"
            )
        translated = np.array([numbers.get(name, -1) for name in test.class_names], np.int64)[asked.labels]
        return cls(learned, replace(asked, labels=translated), num_classes)


def _labelled(features: Features, setting: str) -> _Labelled:
    rows = np.flatnonzero(np.asarray(features.labels) >= 0)
    if not len(rows):
        raise UsageError(
            f"{setting}: none of the {len(features.labels)} images has a label, and probes need them; give class "
            "folders, or a Parquet column by data.label_column"
        )
    return _Labelled(features.values, rows, np.asarray(features.labels)[rows].astype(np.int64))


def _split(
    labels: NDArray[np.int64], share: float, seed: int, most: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A random share of each class, rounded, and the rest; `[k]` classes -> two ascending lists of places.

    The share is one image at least; `most` leaves the rest one too, and takes nothing of a class of one image.
    """
    taken = np.zeros(len(labels), bool)
    for number in np.unique(labels):
        places = np.flatnonzero(labels == number)
        count = max(1, round(share * len(places)))
        count = min(count, len(places) - 1) if most else count
        taken[places[permute(seed, int(number), np.arange(count), len(places))]] = True
    return np.flatnonzero(taken), np.flatnonzero(~taken)


# Heads that learn side by side


class _Heads(nn.Module):
    """Several heads on the same features, each with its own learning rate and weight decay."""

    def forward(self, values: Tensor) -> Tensor:
        """Features or tokens `[b ...]` -> `[b h c]` logits."""
        raise NotImplementedError

    def step(self, loss: Tensor, rate: float) -> None:
        """Takes one step down the sum of the heads' losses, at `rate` times each head's learning rate."""
        raise NotImplementedError


class _LinearHeads(_Heads):
    """LinearHead several times, as one product: SGD with momentum, weight decay as an L2 term.

    The problem is convex: weights start at zero, and where SGD ends depends on little but the L2 term. AdamW, which
    decays in proportion to the learning rate, did worse on scikit-learn's digits (0.962 to 0.970, SGD 0.972 to 0.978,
    LogisticRegression 0.975 to 0.982).
    """

    rates: Tensor
    decays: Tensor
    moving_weight: Tensor
    moving_bias: Tensor

    def __init__(self, settings: Settings, num_classes: int, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        rates = torch.tensor(settings)[:, :, None, None]  # [h 2 1 1]
        self.register_buffer("rates", rates[:, 0])
        self.register_buffer("decays", rates[:, 1])
        self.norm = nn.BatchNorm1d(len(mean), affine=False, eps=1e-6)
        self.norm.running_mean, self.norm.running_var = mean, variance
        self.weight = nn.Parameter(torch.zeros(len(settings), num_classes, len(mean)))
        self.bias = nn.Parameter(torch.zeros(len(settings), num_classes, 1))
        self.register_buffer("moving_weight", torch.zeros_like(self.weight))
        self.register_buffer("moving_bias", torch.zeros_like(self.bias))

    def forward(self, values: Tensor) -> Tensor:
        weight, bias = self.weight.flatten(0, 1), self.bias.flatten()
        return F.linear(self.norm(_pooled(values)), weight, bias).unflatten(1, self.weight.shape[:2])

    def step(self, loss: Tensor, rate: float) -> None:
        weight, bias = torch.autograd.grad(loss, (self.weight, self.bias))
        with torch.no_grad():
            self.moving_weight.mul_(_MOMENTUM).add_(weight).addcmul_(self.decays, self.weight)
            self.moving_bias.mul_(_MOMENTUM).add_(bias)
            self.weight.addcmul_(self.rates, self.moving_weight, value=-rate)
            self.bias.addcmul_(self.rates, self.moving_bias, value=-rate)


class _AttentiveHeads(_Heads):
    """AttentiveHead several times: AdamW."""

    def __init__(self, settings: Settings, num_classes: int, width: int) -> None:
        super().__init__()
        num_heads = width // _HEAD_CHANNELS if width % _HEAD_CHANNELS == 0 else 1
        self.heads = nn.ModuleList(AttentiveHead(width, num_classes, num_heads) for _ in settings)
        groups = []
        for head, (learning_rate, weight_decay) in zip(self.heads, settings, strict=True):
            for decayed in (True, False):
                mine = [
                    value for name, value in head.named_parameters() if is_decayed(name, value) == decayed
                ]
                decay = weight_decay if decayed else 0.0
                groups.append({"params": mine, "peak": learning_rate, "weight_decay": decay})
        self.optimizer = AdamW(groups, lr=0.0, fused=True)

    def forward(self, values: Tensor) -> Tensor:
        return torch.stack([head(values) for head in self.heads], dim=1)

    def step(self, loss: Tensor, rate: float) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        self.optimizer.step()


_Make = Callable[[Settings, int, _Labelled], _Heads]
"""from the settings, the number of classes and the training data"""


def _linear_heads(settings: Settings, num_classes: int, data: _Labelled) -> _Heads:
    return _LinearHeads(settings, num_classes, *_statistics(data))


def _attentive_heads(settings: Settings, num_classes: int, data: _Labelled) -> _Heads:
    return _AttentiveHeads(settings, num_classes, data.values.shape[-1])


def _pooled(values: Tensor) -> Tensor:
    return values.mean(1) if values.ndim == 3 else values


def _statistics(data: _Labelled) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel over the training images, `[d]` float32."""
    total = squares = torch.zeros((), dtype=torch.float64)
    for values, _ in data.in_batches(torch.device("cpu")):
        pooled = _pooled(values).double()
        total, squares = total + pooled.sum(0), squares + pooled.square().sum(0)
    mean = total / len(data.rows)
    variance = squares / len(data.rows) - mean.square()
    # A channel that is constant in training has a spread of nothing but rounding: test images must not be divided by it.
    constant = variance <= _CONSTANT * (mean.square() + variance.abs())
    return mean.float(), variance.masked_fill(constant, 1.0).float()


def _probe(
    task: _Task,
    train: _Labelled,
    make: _Make,
    grid: Grid,
    seed: int,
    device: torch.device,
    progress: Progress | None = None,
) -> tuple[ProbeResult, NDArray[np.bool_]]:
    """Tries the grid, trains the winner's setting on all of `train`, and says which test images it gets right."""
    held_out, rest = _split(train.labels, grid.held_out, key(seed, "held out"), most=True)
    steps = grid.num_steps(len(rest)), grid.num_steps(len(train.rows))
    tick = _counting(progress, sum(steps))
    heads = _learn(make, task.num_classes, train.take(rest), grid, grid.settings, seed, device, tick)
    tried = _judged(heads, grid, train.take(held_out), device)
    # Without held-out images there is nothing to choose by: the middle of the grid.
    chosen = max(tried, key=_quality) if len(held_out) else tried[len(tried) // 2]
    rates = [(chosen.learning_rate, chosen.weight_decay)]
    winner = _learn(make, task.num_classes, train, grid, rates, seed, device, tick)
    return ProbeResult({}, tried, chosen), _answers(winner, task.test, device)[0][0]


def _judged(heads: _Heads, grid: Grid, held_out: _Labelled, device: torch.device) -> tuple[TriedHead, ...]:
    if not len(held_out.rows):
        return tuple(TriedHead(*rates, math.nan, math.nan) for rates in grid.settings)
    correct, losses = _answers(heads, held_out, device)
    judged = zip(grid.settings, correct.mean(1).tolist(), losses.mean(1).tolist(), strict=True)
    return tuple(TriedHead(*rates, top1, loss) for rates, top1, loss in judged)


def _quality(head: TriedHead) -> tuple[float, float]:
    return head.held_out_top1, -math.inf if math.isnan(head.held_out_loss) else -head.held_out_loss


def _counting(progress: Progress | None, count: int) -> Callable[[], None]:
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, count)

    return tick


def _learn(
    make: _Make,
    num_classes: int,
    data: _Labelled,
    grid: Grid,
    settings: Settings,
    seed: int,
    device: torch.device,
    tick: Callable[[], None],
) -> _Heads:
    """Trains one head for each (learning rate, weight decay), all on the same batches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "probe weights"))
        heads = make(settings, num_classes, data).to(device)
    heads.eval()  # the normalisation's statistics stay as they are; nothing else knows of modes
    num_steps = grid.num_steps(len(data.rows))
    for step, numbers in enumerate(_orders(data, grid, num_steps, key(seed, "probe order"))):
        values, labels = data.take(numbers).load(device)
        logits = heads(values)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(len(settings)), reduction="sum")
        # The sum over the heads of their mean losses: no head feels another.
        heads.step(loss / len(labels), _rate(step, num_steps, grid.warmup))
        tick()
    return heads


def _rate(step: int, num_steps: int, warmup: float) -> float:
    """Share of the peak learning rate: rises linearly, then falls as a cosine to zero."""
    rise = max(1, round(warmup * num_steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, num_steps - rise)))


def _orders(data: _Labelled, grid: Grid, num_steps: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """The rows of each step: every epoch in an order of its own."""
    count = len(data.rows)
    for epoch in range(num_steps // -(-count // grid.batch_size)):
        order = permute(seed, epoch, np.arange(count), count)
        for first in range(0, count, grid.batch_size):
            yield order[first : first + grid.batch_size]


@torch.no_grad()
def _answers(
    heads: _Heads, data: _Labelled, device: torch.device
) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """`[h k]` which images each head gets right, and its loss for each."""
    correct, losses = [], []
    for values, labels in data.in_batches(device):
        logits = heads(values)
        correct.append(logits.argmax(2) == labels[:, None])
        losses.append(F.cross_entropy(logits.mT, labels[:, None].expand(logits.shape[:2]), reduction="none"))
    return torch.cat(correct).T.cpu().numpy(), torch.cat(losses).T.cpu().numpy()
