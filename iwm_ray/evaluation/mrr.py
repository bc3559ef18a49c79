"""Mean reciprocal rank: does the world model know what an action does? (IWM, section 4; METHOD, section 4)

Every image gets a bank of jittered views. From the clean image and the action that leads to one of the views,
the predictor imagines that view's tokens; the rank of the true view among the bank, by distance to what was
imagined, is 1 for a model that knows the action (equivariant) and anything for one that ignores it.

Two halves: `rank_images` runs the model, image by image, so that many workers can share the images;
`summarise` makes figures of the joined tables. `measure_mrr` is both.

**Cost.** A bank of n views costs n passes of the target encoder; each target costs a pass of the predictor. The
first views of a bank, which are drawn like all others, serve as targets: 8 of 256 give an estimate of the same
figure, for a few per cent above the encoding. With `num_targets=num_views` every view serves once, as METHOD has
it; that costs a predictor pass a view, which is half of an encoder's (ViT-B, 12 x 384) to twice (equal sizes).
To narrow the interval, more images are the better buy: ranks within one bank resemble each other. Measured (4 x 128
encoder and predictor, CIFAR-10): reciprocal ranks have a variance of 0.016 between banks and 0.123 within, so 8
targets make an interval 1.5 times as wide as 256, at 0.4 of the cost.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iwm_ray.errors import UsageError
from iwm_ray.evaluation.banks import alone, bank_draws, bank_tensors, clean_actions
from iwm_ray.evaluation.features import measuring, model_device
from iwm_ray.evaluation.intervals import means
from iwm_ray.evaluation.ranking import average_ranks, chance_mrr, pooled_distances, token_distances
from iwm_ray.evaluation.shuffle import derangement
from iwm_ray.model.iwm import IWM
from iwm_ray.views.draws import Draws
from iwm_ray.views.policy import ViewPolicy

Table = dict[str, NDArray]
"""One row an image; tables of disjoint images are joined by `np.concatenate` of each column"""

NUM_VIEWS, NUM_TARGETS = 256, 8
_CPU_BATCH, _DEVICE_BATCH = (
    64,
    256,
)  # on a CPU thread 64 are a fifth faster: the activations stay in the cache
_HITS = (1, 5, 10)
_WITH_HITS = ("rank", "pooled_rank")


@dataclass(frozen=True)
class MrrResult:
    """The figures, and what a picture of them needs."""

    metrics: dict[str, float]
    """see `summarise`"""
    table: Table
    """see `rank_images`; k images with m targets in banks of n views"""
    draws: Draws
    """k * n rows, the views of an image one after the other"""


def measure_mrr(
    model: IWM,
    images: NDArray[np.uint8],
    policy: ViewPolicy,
    *,
    seed: int,
    num_views: int = NUM_VIEWS,
    num_targets: int = NUM_TARGETS,
    batch_size: int = 0,
    by_component: bool = False,
    inverse: bool = False,
) -> MrrResult:
    """Ranks and figures of `[k s s 3]` images, numbered as they come; for the arguments see `rank_images`."""
    numbers = np.arange(len(images))
    table = rank_images(
        model,
        policy,
        images,
        numbers,
        seed=seed,
        num_views=num_views,
        num_targets=num_targets,
        batch_size=batch_size,
        by_component=by_component,
        inverse=inverse,
    )
    return MrrResult(summarise(table, seed), table, bank_draws(policy, numbers, num_views, seed))


def rank_images(
    model: IWM,
    policy: ViewPolicy,
    images: NDArray[np.uint8],
    numbers: NDArray[np.int64],
    *,
    seed: int,
    num_views: int = NUM_VIEWS,
    num_targets: int = NUM_TARGETS,
    batch_size: int = 0,
    by_component: bool = False,
    inverse: bool = False,
) -> Table:
    """Measures how well the predictor tells the views of each image apart.

    Each bank holds views with the policy's target jitter, always applied. The target encoder encodes the views
    whole; the predictor gets the context encoder's tokens of the whole clean image and predicts the whole grid.
    A row of the table depends on its image, its number and the arguments, never on the other images.

    Controls: with the null action all views of an image get the same prediction, which makes chance by
    construction (less where distances tie); with shuffled actions a model that knows the action falls below
    chance, since it is sure of another view.

    Inverse: the context encoder sees a view, the action leads back, and the clean image must be found among the
    views; it takes the place of the view that follows the seen one, so that chance is the same, and the seen one
    stays, as the answer of a model that changes nothing. The clean image lies in the middle of its bank, so that
    a model which imagines the middle finds it without any action (0.054 beside a chance of 0.024 was measured for
    one without conditioning): read the figure beside its own controls.

    Differs: the paper does not say what its banks do with ties and with views that the jitter left alone.
    With fewer targets than views, not every view of a bank serves as one.

    Args:
        model: keeps its weights and training flags; runs where it is, under the caller's autocast.
        policy: its target jitter makes the banks.
        images: `[k s s 3]` RGB, clean centre crops of the policy's size, at least one.
        numbers: `[k]`, which image each is; the same number and seed give the same bank in every call.
        seed: of the banks.
        num_views: n, at least 2.
        num_targets: m, at least 2; the first m views serve as targets, at most all.
        batch_size: views in one forward pass; 0: 64 on a CPU, 256 on another device.
        by_component: rank also in banks that vary in one component of the jitter alone, each at the same cost
            again. Such a bank is crowded: its views differ by 1/n of one strength.
        inverse: rank also the way back: m passes of the context encoder and 3 m of the predictor.

    Returns:
        `number`, `num_views` `[k]`; `rank` `[k m]` of the true views in 1..n by the token distance, also with the
        null action (`zero_action_rank`) and that of another target (`shuffled_action_rank`), all three also by
        the cosine of the mean tokens (`pooled_...`) and, if asked for, `inverse_...`; `<component>_rank`;
        `nearest` `[k m]` and `zero_nearest` `[k]`, the view next to the prediction; `shuffled` `[k m]`, the
        target whose action stood in.

    Raises:
        UsageError: the jitter has no strength: all views of a bank would be equal.
    """
    if not any(field.scale for field in policy.target_jitter.fields):
        raise UsageError(
            "views.brightness, contrast, saturation, hue are all 0: MRR needs views that differ; raise one"
        )
    batch_size = batch_size or (_CPU_BATCH if model_device(model).type == "cpu" else _DEVICE_BATCH)
    ranker = _Ranker(model, policy, seed, num_views, min(num_targets, num_views), batch_size)
    with measuring(model):
        # Nothing is read back from the device before the last image is ranked.
        rows = [
            ranker.row(image, int(number), by_component, inverse)
            for image, number in zip(images, numbers, strict=True)
        ]
    table: Table = {name: torch.stack([row[name] for row in rows]).cpu().numpy() for name in rows[0]}
    return {"number": np.asarray(numbers), "num_views": np.full(len(rows), num_views)} | table


def summarise(table: Mapping[str, NDArray], seed: int) -> dict[str, float]:
    """The figures of a table of `rank_images`, or of several joined.

    Returns:
        `mrr/mrr`; `mrr/adjusted` (0: chance, 1: perfect); `mrr/h1`, `mrr/h5`, `mrr/h10` (share of ranks up to 1,
        5, 10); `mrr/mean_rank`; `mrr/zero_action`, `mrr/shuffled_action`; the same by pooled cosine as
        `mrr/pooled`, `mrr/pooled_...`; `mrr/inverse`, `mrr/inverse_...` and `mrr/<component>` where the table has
        them. Each is a mean over images with the ends of its 95 % interval as `<name>_low` and `<name>_high`.
        `mrr/chance` is exact.
    """
    (num_views,) = {int(count) for count in table["num_views"]}
    chance = chance_mrr(num_views)
    columns: dict[str, NDArray] = {}
    for name in (name for name in table if name.endswith("rank")):
        ranks, short = table[name], name.removesuffix("rank").removesuffix("_")
        prefix = f"{short}_" if short else ""
        columns[f"mrr/{short or 'mrr'}"] = mrr = (1 / ranks).mean(1)
        if name in _WITH_HITS:
            columns[f"mrr/{prefix}adjusted"] = (mrr - chance) / (1 - chance)
            columns |= {f"mrr/{prefix}h{place}": (ranks <= place).mean(1) for place in _HITS}
            columns[f"mrr/{prefix}mean_rank"] = ranks.mean(1)
    return {"mrr/chance": chance} | means(columns, seed)


def rank_rows(table: Mapping[str, NDArray], policy: ViewPolicy, seed: int) -> dict[str, NDArray]:
    """One row for each target, for Parquet: which actions does the model find, and which not?

    Args:
        table: of `rank_images`, or several joined.
        policy: with which it was made.
        seed: with which it was made.

    Returns:
        columns of k * m values: `image` (its number), `view`, the ranks as they are named there, and what made the
        view: brightness, contrast, saturation (factors), hue (turns), and `order` of the four as digits.
    """
    num_images, num_targets = table["rank"].shape
    draws = bank_draws(policy, table["number"], num_targets, seed)
    rows = {
        "image": table["number"].repeat(num_targets),
        "view": np.tile(np.arange(num_targets), num_images),
        **{name: column.reshape(-1) for name, column in table.items() if name.endswith("rank")},
        **{field.name: draws[f"target_{field.name}"] for field in policy.target_jitter.fields},
    }
    return rows | {"order": np.array(["".join(map(str, order)) for order in draws["target_order"]])}


@dataclass(frozen=True)
class _Ranker:
    """Ranks the targets of one image at a time; shapes as in `rank_images`."""

    model: IWM
    policy: ViewPolicy
    seed: int
    num_views: int
    num_targets: int
    batch_size: int

    def row(
        self, image: NDArray[np.uint8], number: int, by_component: bool, inverse: bool
    ) -> dict[str, Tensor]:
        """`[s s 3]` clean image -> its row of the table."""
        draws = bank_draws(self.policy, np.array([number]), self.num_views, self.seed)
        clean, views = bank_tensors(self.policy, image, draws, model_device(self.model))
        shuffled = torch.from_numpy(derangement(self.seed, number, self.num_targets)).to(clean.device)
        context, bank, actions = self.model.encoder(clean), self._encode(views), self._actions(draws)
        row = {"shuffled": shuffled} | self._forward(context, bank, actions, shuffled)
        if inverse:
            row |= self._inverse(clean, views, bank, actions, shuffled)
        for field in self.policy.target_jitter.fields if by_component else ():
            if field.scale:
                some = alone(self.policy, draws, field.name)
                bank = self._encode(bank_tensors(self.policy, image, some, clean.device)[1])
                prediction = self._predict(context, self._actions(some))
                row[f"{field.name}_rank"] = average_ranks(token_distances(prediction, bank), self._places)
        return row

    def _forward(self, context: Tensor, bank: Tensor, actions: Tensor, shuffled: Tensor) -> dict[str, Tensor]:
        """From the clean image to its views; the controls cost one more prediction."""
        prediction = self._predict(context, torch.cat([actions, torch.zeros_like(actions[:1])]))
        by_tokens, by_pooled = token_distances(prediction, bank), pooled_distances(prediction, bank)
        row = {"nearest": by_tokens[:-1].argmin(1), "zero_nearest": by_tokens[-1].argmin()}
        for prefix, distances in (("", by_tokens), ("pooled_", by_pooled)):
            true, zero = distances[:-1], distances[-1:].expand(self.num_targets, -1)
            row[f"{prefix}rank"] = average_ranks(true, self._places)
            row[f"{prefix}zero_action_rank"] = average_ranks(zero, self._places)
            row[f"{prefix}shuffled_action_rank"] = average_ranks(true[shuffled], self._places)
        return row

    def _inverse(
        self, clean: Tensor, views: Tensor, bank: Tensor, actions: Tensor, shuffled: Tensor
    ) -> dict[str, Tensor]:
        """From each target view back to the clean image."""
        sources = torch.cat([self.model.encoder(part) for part in self._parts(views[: self.num_targets])])
        candidates, following = self._encode(clean), (self._places + 1) % self.num_views
        back = 0.0 - actions
        named = {"": back, "zero_action_": torch.zeros_like(back), "shuffled_action_": back[shuffled]}
        row = {}
        for name, action in named.items():
            prediction = self._predict(sources, action)
            distances = token_distances(prediction, torch.cat([bank, candidates]))
            among = distances[:, :-1].scatter(1, following[:, None], distances[:, -1:])
            row[f"inverse_{name}rank"] = average_ranks(among, following)
        return row

    @property
    def _places(self) -> Tensor:
        return torch.arange(self.num_targets, device=model_device(self.model))

    def _actions(self, draws: Draws) -> Tensor:
        """`[m a]`, from the clean image to the targets."""
        actions = clean_actions(self.policy, draws)[: self.num_targets]
        return torch.from_numpy(actions).to(model_device(self.model))

    def _encode(self, views: Tensor) -> Tensor:
        return torch.cat([self.model.target_tokens(part) for part in self._parts(views)])

    def _predict(self, context: Tensor, actions: Tensor) -> Tensor:
        """`[1 n d]` or `[m n d]` tokens of the sources and `[m a]` -> `[m n d]`, the whole grid."""
        context = context.expand(len(actions), -1, -1)
        grid = torch.arange(context.shape[1], device=context.device).expand(len(actions), -1)
        parts = zip(self._parts(context), self._parts(grid), self._parts(actions), strict=True)
        return torch.cat([self.model.predictor(tokens, idx, idx, action) for tokens, idx, action in parts])

    def _parts(self, rows: Tensor) -> Iterator[Tensor]:
        """Parts of nearly equal size, none above the batch size."""
        return iter(rows.tensor_split(-(-len(rows) // self.batch_size)))
