"""Mean reciprocal rank: does the world model know what an action does? (IWM, section 4; METHOD, section 4)

Every image gets a bank of jittered views. From the clean image and the action that leads to one of the views,
the predictor imagines that view's tokens; the rank of the true view among the bank, by distance to what was
imagined, is 1 for a model that knows the action (equivariant) and anything for one that ignores it.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from numpy.typing import NDArray
from torch import Tensor

from iwm_ray import randomness
from iwm_ray.errors import UsageError
from iwm_ray.evaluation.features import measuring, model_device
from iwm_ray.evaluation.shuffle import derangement
from iwm_ray.model.iwm import IWM
from iwm_ray.views.device import device_views
from iwm_ray.views.draws import Draws, Keys
from iwm_ray.views.policy import ViewPolicy

_TIE = 1e-9  # distances are float64 of the order of 1: equal views differ by 1e-15, others by far more
_TOKENS_AT_ONCE = 64  # turned to float64 at a time: bounds the memory beside the float32 tokens
_NUM_RESAMPLES = 2000  # of the bootstrap: its ends are then steady to some hundredths of the interval


@dataclass(frozen=True)
class MrrResult:
    """Ranks of every view of every bank, and what a picture of them needs; k images with n views each."""

    metrics: dict[str, float]
    """`mrr/mrr`; `mrr/mrr_low` and `mrr/mrr_high` (95 % bootstrap interval over images); `mrr/chance`;
    `mrr/adjusted` (0: chance, 1: perfect); `mrr/h1`, `mrr/h5`, `mrr/h10` (share of ranks up to 1, 5, 10);
    `mrr/pooled` (by the cosine of the mean tokens); `mrr/zero_action`; `mrr/shuffled_action`; with
    `by_component` also `mrr/<component>`"""
    draws: Draws
    """k * n rows, the views of an image one after the other"""
    actions: NDArray[np.float32]
    """`[k n a]`, from the clean image to the view"""
    ranks: NDArray[np.float64]
    """`[k n]` of the true views, 1..n"""
    zero_ranks: NDArray[np.float64]
    """`[k n]`, where the prediction had the null action"""
    shuffled_ranks: NDArray[np.float64]
    """`[k n]`, where it had the action of another view of the same image"""
    nearest: NDArray[np.int64]
    """`[k n]`, the view that lies next to the prediction"""
    zero_nearest: NDArray[np.int64]
    """`[k]`, the view next to the prediction with the null action"""
    shuffled: NDArray[np.int64]
    """`[k n]`, the view whose action stood in for this one's"""


@dataclass(frozen=True)
class _BankKeys(Keys):
    """Draws for `num_views` views of each image; a larger bank begins with the smaller one."""

    num_views: int

    def __len__(self) -> int:
        return len(self.samples) * self.num_views

    def uniforms(self, purpose: str, count: int) -> NDArray[np.float64]:
        numbers = randomness.uniforms(self.seed, 0, self.samples, f"mrr {purpose}", self.num_views * count)
        return numbers.reshape(-1, count)


def measure_mrr(
    model: IWM,
    images: NDArray[np.uint8],
    policy: ViewPolicy,
    *,
    seed: int,
    num_views: int = 256,
    batch_size: int = 256,
    by_component: bool = False,
) -> MrrResult:
    """Measures how well the predictor tells the views of an image apart.

    Each bank holds views with the policy's target jitter, always applied; each view serves as the target
    once. The target encoder encodes the views whole; the predictor gets the context encoder's tokens of the
    whole clean image and predicts the whole grid. Distance: mean over the tokens of the squared L2; ties get
    their average rank. An image costs `num_views` passes of encoder and predictor, and one more of each.

    Controls: with the null action all views of an image get the same prediction, which makes chance by
    construction (less where distances tie); with shuffled actions a model that knows the action falls below
    chance, since it is sure of another view.

    Differs: the paper does not say what its banks do with ties and with views that the jitter left alone.

    Args:
        model: keeps its weights and training flags; runs where it is, under the caller's autocast.
        images: `[k s s 3]` RGB, clean centre crops of the policy's size, at least one.
        policy: its target jitter makes the banks.
        seed: of the banks; image number i gets the same one in every call.
        num_views: n, at least 2.
        batch_size: views in one forward pass.
        by_component: measure also banks that vary in one component of the jitter alone, each at the same cost
            again. Such a bank is crowded: its views differ by 1/n of one strength.

    Raises:
        UsageError: the jitter has no strength: all views of a bank would be equal.
    """
    if not any(field.scale for field in policy.target_jitter.fields):
        raise UsageError(
            "views.brightness, contrast, saturation, hue are all 0: MRR needs views that differ; raise one"
        )
    draws = bank_draws(policy, len(images), num_views, seed)
    shuffled = np.stack([derangement(seed, number, num_views) for number in range(len(images))])
    ranker = _Ranker(model, policy, batch_size)
    with measuring(model):
        table = ranker.table(images, draws, shuffled)
        metrics = _metrics(table, seed)
        for field in policy.target_jitter.fields if by_component else ():
            if field.scale:
                ranks = ranker.table(images, _alone(policy, draws, field.name), shuffled)["ranks"]
                metrics[f"mrr/{field.name}"] = float((1 / ranks).mean())
    del table["pooled_ranks"]
    actions = clean_actions(policy, draws).reshape(*shuffled.shape, -1)
    return MrrResult(metrics, draws, actions, shuffled=shuffled, **table)


def bank_draws(policy: ViewPolicy, num_images: int, num_views: int, seed: int) -> Draws:
    """Draws of the banks: `num_images * num_views` rows, nothing but the target jitter, always applied."""
    images = np.arange(num_images)
    keys = _BankKeys(seed, np.zeros_like(images), images, num_views)
    return policy.identity(len(keys)) | replace(policy.target_jitter, probability=1.0).sample(keys)


def bank_views(policy: ViewPolicy, image: NDArray[np.uint8], draws: Draws) -> NDArray[np.uint8]:
    """The views of one image's bank: `[s s 3]` and n rows of draws -> `[n s s 3]`."""
    rows = range(len(draws["target_jitter"]))
    return np.stack([policy.target_jitter.apply(image, draws, row) for row in rows])


def clean_actions(policy: ViewPolicy, draws: Draws) -> NDArray[np.float32]:
    """`[n a]`: what leads from the clean image to the views."""
    # Where sources are made from targets, the target's jitter cancels and the action leaves it out; between
    # the clean image and its view it does not cancel.
    return replace(policy, source_base="crop").encode(draws)


def chance_mrr(num_views: int) -> float:
    """MRR of a random order: the mean of 1 / rank over all ranks."""
    return sum(1 / rank for rank in range(1, num_views + 1)) / num_views


def token_distances(predictions: Tensor, bank: Tensor) -> Tensor:
    """Mean over the tokens of the squared L2, as a share of the mean squared length of the bank's tokens.

    In float64: near a good prediction |p|^2 - 2 pq + |q|^2 cancels to the last digits of float32. The share
    makes distances comparable to one tolerance; the ranks do not depend on it.

    Args:
        predictions: `[p n d]`.
        bank: `[k n d]`.

    Returns:
        `[p k]` float64, 0 or more.
    """
    distances = torch.zeros(len(predictions), len(bank), dtype=torch.float64, device=bank.device)
    length = torch.zeros((), dtype=torch.float64, device=bank.device)
    for some_predictions, some_bank in zip(
        predictions.split(_TOKENS_AT_ONCE, dim=1), bank.split(_TOKENS_AT_ONCE, dim=1), strict=True
    ):
        p, q = some_predictions.flatten(1).double(), some_bank.flatten(1).double()
        squares = q.square().sum(1)
        distances += p.square().sum(1)[:, None] - 2 * p @ q.T + squares
        length += squares.mean()
    return distances.clamp_min(0) / length.clamp_min(torch.finfo(torch.float64).tiny)


def pooled_distances(predictions: Tensor, bank: Tensor) -> Tensor:
    """1 - cosine of the mean tokens: `[p n d]` and `[k n d]` -> `[p k]` float64, 0..2."""
    p, q = (F.normalize(tokens.mean(1, dtype=torch.float64), dim=1) for tokens in (predictions, bank))
    return 1 - p @ q.T


def average_ranks(distances: Tensor) -> Tensor:
    """The rank of candidate i in row i, the nearest being 1; equal distances share the mean of their ranks.

    Args:
        distances: `[n n]` float64, of the order of 1.

    Returns:
        `[n]` float64 in 1..n, whole or half numbers.
    """
    true = distances.diagonal()[:, None]
    nearer = (distances < true - _TIE).sum(1)
    equal = ((distances - true).abs() <= _TIE).sum(1)  # counts itself
    return nearer + (equal + 1) / 2.0


@dataclass(frozen=True)
class _Ranker:
    """Ranks the views of images; reads nothing back from the device before the last image is ranked."""

    model: IWM
    policy: ViewPolicy
    batch_size: int

    def rank(self, image: NDArray[np.uint8], draws: Draws, shuffled: NDArray[np.int64]) -> dict[str, Tensor]:
        """`[s s 3]` clean image, n rows of draws, `[n]` stand-ins -> this image's columns of MrrResult."""
        device = model_device(self.model)
        num_parts = math.ceil(len(shuffled) / self.batch_size)
        clean = torch.tensor(image)[None].to(device)
        views = self._views(clean, draws)
        bank = torch.cat([self.model.target_tokens(part) for part in views.tensor_split(num_parts)])
        actions = torch.from_numpy(clean_actions(self.policy, draws)).to(device)
        actions = torch.cat([actions, torch.zeros_like(actions[:1])])  # the last row: the null action
        context, grid = self.model.encoder(_channels_first(clean)), torch.arange(bank.shape[1], device=device)
        by_tokens, by_pooled = [], []
        for part in actions.tensor_split(num_parts):
            idx = grid.expand(len(part), -1)
            prediction = self.model.predictor(context.expand(len(part), -1, -1), idx, idx, part)
            by_tokens.append(token_distances(prediction, bank))
            by_pooled.append(pooled_distances(prediction, bank))
        distances, zero = torch.cat(by_tokens).split([len(shuffled), 1])
        return {
            "ranks": average_ranks(distances),
            "zero_ranks": average_ranks(zero.expand_as(distances)),
            "shuffled_ranks": average_ranks(distances[torch.from_numpy(shuffled).to(device)]),
            "pooled_ranks": average_ranks(torch.cat(by_pooled)[:-1]),
            "nearest": distances.argmin(1),
            "zero_nearest": zero[0].argmin(),
        }

    def table(
        self, images: NDArray[np.uint8], draws: Draws, shuffled: NDArray[np.int64]
    ) -> dict[str, NDArray]:
        """The columns of MrrResult for k images, k * n rows of draws and `[k n]` stand-ins."""
        found = [
            self.rank(image, _rows(draws, number * len(others), len(others)), others)
            for number, (image, others) in enumerate(zip(images, shuffled, strict=True))
        ]
        return {name: torch.stack([row[name] for row in found]).cpu().numpy() for name in found[0]}

    def _views(self, clean: Tensor, draws: Draws) -> Tensor:
        """`[1 s s 3]` -> `[n 3 s s]` uint8, on the image's device."""
        # On CPUs OpenCV is ten times faster than torch.
        if clean.device.type == "cpu":
            return _channels_first(torch.from_numpy(bank_views(self.policy, clean[0].numpy(), draws)))
        return device_views(clean.expand(len(draws["flip"]), -1, -1, -1), draws, self.policy)[1]


def _channels_first(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2)


def _rows(draws: Draws, first: int, count: int) -> Draws:
    return {name: column[first : first + count] for name, column in draws.items()}


def _metrics(table: dict[str, NDArray], seed: int) -> dict[str, float]:
    ranks = table["ranks"]
    by_image = (1 / ranks).mean(1)
    mrr, chance = float(by_image.mean()), chance_mrr(ranks.shape[1])
    low, high = _bootstrap(by_image, seed)
    return {
        "mrr/mrr": mrr,
        "mrr/mrr_low": low,
        "mrr/mrr_high": high,
        "mrr/chance": chance,
        "mrr/adjusted": (mrr - chance) / (1 - chance),
        **{f"mrr/h{k}": float((ranks <= k).mean()) for k in (1, 5, 10)},
        "mrr/pooled": float((1 / table["pooled_ranks"]).mean()),
        "mrr/zero_action": float((1 / table["zero_ranks"]).mean()),
        "mrr/shuffled_action": float((1 / table["shuffled_ranks"]).mean()),
    }


def _bootstrap(values: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """Ends of the 95 % percentile interval of the mean of `[k]` values."""
    uniform = randomness.uniforms(seed, 0, np.arange(_NUM_RESAMPLES), "mrr bootstrap", len(values))
    means = values[(uniform * len(values)).astype(np.int64)].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _alone(policy: ViewPolicy, draws: Draws, component: str) -> Draws:
    """The same draws with all of the jitter but `component` at its identity."""
    identity = policy.target_jitter.identity(len(draws["target_jitter"]))
    kept = ("target_jitter", "target_order", f"target_{component}")
    return draws | {name: column for name, column in identity.items() if name not in kept}
