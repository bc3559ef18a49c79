"""How much of the action can be read linearly from representations? (METHOD, section 4: R^2 of a ridge regression)

Two halves, as in mrr.py: `action_features` runs the model, image by image; `regress` fits and tests on the joined
table. Ridge regressions of the action on pooled tokens of pairs of views:

- both views, (z_x, z_y), by the target encoder: what the encoder keeps of photometric change. High: the encoder is
  equivariant; a frozen, untrained one gives the value to compare with.
- prediction, (z_x, p(x, a)): whether the action can be read from what the predictor imagines. High says little: an
  untrained predictor passes its action on (0.98 measured). Without conditioning it is what the source shows.
- transfer: the regression that was fitted on both views, applied to (z_x, p(x, a)): whether the action shows in what
  is imagined as it shows in real targets. Measured on CIFAR-10: 0.42 for a model whose figure of both views is 0.39
  (predictions are smoother than targets), 0.25 without conditioning (source: 0.23), -2.2 untrained.
- source, z_x alone, the control: an action's flags and half of its jitter can be seen in the source, without any
  target. What the other two have above this is theirs.

Differs: the paper has no such figure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iwm_ray import randomness
from iwm_ray.errors import UsageError
from iwm_ray.evaluation.features import measuring, model_device
from iwm_ray.evaluation.intervals import Floats, named
from iwm_ray.evaluation.pairs import draw_pairs
from iwm_ray.evaluation.shuffle import derangement
from iwm_ray.model.iwm import IWM
from iwm_ray.views.policy import ViewPolicy

PENALTIES = tuple(10.0**power for power in range(-7, 3))
"""of the ridge regression, in units of the mean variance of a feature times the number of rows"""

_FIT, _CHOOSE = 0.6, 0.2  # shares of the images to fit on and to choose the penalty on; the rest is the test
_MIN_IMAGES = 10


def action_features(
    model: IWM,
    policy: ViewPolicy,
    images: NDArray[np.uint8],
    numbers: NDArray[np.int64],
    *,
    seed: int,
    num_pairs: int = 4,
    batch_size: int = 64,
) -> dict[str, NDArray]:
    """Pooled tokens and actions of pairs of views, drawn as in training (destructive transforms and all).

    Args:
        model: keeps its weights and training flags; runs where it is, under the caller's autocast.
        policy: makes the views.
        images: `[k s s 3]` RGB, clean; numbers: `[k]`, which they are (see `draw_pairs`).
        seed: of the views.
        num_pairs: v pairs of each image.
        batch_size: pairs in one forward pass.

    Returns:
        `number` `[k]`; `source`, `target` (target encoder) and `prediction` (from the context encoder's tokens of the
        source), mean over the whole grid, `[k v d]` float32; `action` `[k v a]`.
    """
    device = model_device(model)
    tokens, actions = [], []
    with measuring(model):
        for image, number in zip(images, numbers, strict=True):
            pairs = draw_pairs(policy, image[None], np.array([number]), seed, num_pairs)
            sides = (side[0].split(batch_size) for side in (pairs.source, pairs.target, pairs.action))
            parts = (_pooled(model, *(side.to(device) for side in part)) for part in zip(*sides, strict=True))
            tokens.append(torch.cat(list(parts), dim=1))
            actions.append(pairs.action[0])
        pooled = torch.stack(tokens, dim=1).cpu().numpy()
    columns = dict(zip(("source", "target", "prediction"), pooled, strict=True))
    return {"number": np.asarray(numbers), "action": torch.stack(actions).numpy()} | columns


def _pooled(model: IWM, source: Tensor, target: Tensor, action: Tensor) -> Tensor:
    """`[3 b d]`: mean tokens of the source, of the target, and of what is predicted."""
    sides = model.target_tokens(source), model.target_tokens(target), model.predict(source, action)
    return torch.stack([tokens.float().mean(1) for tokens in sides])


def regress(table: Mapping[str, NDArray], components: Sequence[str], seed: int) -> dict[str, float]:
    """R^2 on images that were neither fitted nor used to choose the penalty.

    Args:
        table: of `action_features`, or several joined; the order of the images does not matter.
        components: names of the action's components.
        seed: of the split of the images (0.6 fit, 0.2 choose, 0.2 test), the control and the intervals.

    Returns:
        `action_r2/<component>` and `action_r2/mean` from both views; `action_r2/prediction_...` from source and
        prediction; `action_r2/transfer_...`, fitted on both views and applied to source and prediction;
        `action_r2/source_...` from the source alone; `action_r2/shuffled_mean` from both views with the actions
        of other pairs, not above 0 by more than chance. Components that do not vary are left out. Each has the
        ends of its 95 % interval over the test images as `..._low` and `..._high`. 1: exact; 0: no better than
        the mean; below: worse.

    Raises:
        UsageError: fewer than 10 images, or an action that does not vary.
    """
    if len(table["number"]) < _MIN_IMAGES:
        raise UsageError(
            f"action_r2 has {len(table['number'])} images, it needs {_MIN_IMAGES}; measure it on more"
        )
    uniform = randomness.uniforms(seed, 0, table["number"], "r2 split", 1)[:, 0]
    table = {name: column[np.argsort(uniform)].astype(np.float64) for name, column in table.items()}
    varied = [place for place in range(len(components)) if np.ptp(table["action"][..., place]) > 0]
    if not varied:
        raise UsageError("action_r2: the views have no photometric action; raise views.brightness or another")
    source, actions = table["source"], table["action"][..., varied]
    both = np.concatenate([source, table["target"]], axis=2)
    imagined = np.concatenate([source, table["prediction"]], axis=2)
    others = derangement(seed, 0, actions[..., 0].size)
    shuffled = actions.reshape(-1, len(varied))[others].reshape(actions.shape)
    tests = {
        "": _Test.of(both, actions),
        "prediction_": _Test.of(imagined, actions),
        "transfer_": _Test.of(both, actions, imagined),
        "source_": _Test.of(source, actions),
        "shuffled_": _Test.of(both, shuffled),
    }
    names = [components[place] for place in varied]
    kept = {prefix: ["mean"] if prefix == "shuffled_" else ["mean", *names] for prefix in tests}

    def figures(weights: Floats) -> Floats:
        found = []
        for prefix, test in tests.items():
            r2 = test.r2(weights)
            found.append(np.array([r2.mean(), *r2])[: len(kept[prefix])])
        return np.concatenate(found)

    labels = tuple(f"action_r2/{prefix}{name}" for prefix in tests for name in kept[prefix])
    return named(labels, figures, len(tests[""].residual), seed)


def ridge(features: Floats, actions: Floats, penalties: Sequence[float]) -> tuple[Floats, Floats]:
    """Ridge regressions with an intercept, in closed form, all penalties from one decomposition.

    Args:
        features: `[r f]`.
        actions: `[r a]`.
        penalties: p of them, in units of the features' mean variance times r (`PENALTIES`).

    Returns:
        `[p f a]` weights and `[p a]` intercepts.
    """
    feature_mean, action_mean = features.mean(0), actions.mean(0)
    centred = features - feature_mean
    values, vectors = np.linalg.eigh(centred.T @ centred)
    unit = max(values.mean(), np.finfo(np.float64).tiny)
    projected = vectors.T @ (centred.T @ (actions - action_mean))
    weights = np.stack(
        [vectors @ (projected / (values.clip(0) + penalty * unit)[:, None]) for penalty in penalties]
    )
    return weights, action_mean - feature_mean @ weights


@dataclass(frozen=True)
class _Test:
    """What is left of the actions of the test images, each summed over the pairs of an image: `[k a]`."""

    residual: Floats
    """sum of squared errors"""
    total: Floats
    """sum of the actions"""
    squares: Floats
    """sum of their squares"""
    num_pairs: int

    @classmethod
    def of(cls, features: Floats, actions: Floats, others: Floats | None = None) -> "_Test":
        """Fits, chooses and tests on `[k v f]` and `[k v a]`, in the order of the rows; tests on `others` if given."""
        cuts = (round(_FIT * len(features)), round((_FIT + _CHOOSE) * len(features)))
        tested = features if others is None else others
        (fit, choose, _), (_, _, test), (fit_action, choose_action, test_action) = (
            [part.reshape(-1, part.shape[2]) for part in np.split(rows, cuts)]
            for rows in (features, tested, actions)
        )
        weights, intercepts = ridge(fit, fit_action, PENALTIES)
        errors = np.square(choose @ weights + intercepts[:, None] - choose_action).sum(1)
        best = errors.argmin(0)  # of each component
        chosen = np.arange(len(best))
        weights, intercepts = ridge(
            np.concatenate([fit, choose]), np.concatenate([fit_action, choose_action]), PENALTIES
        )
        predicted = test @ weights[best, :, chosen].T + intercepts[best, chosen]
        sums = (np.square(predicted - test_action), test_action, np.square(test_action))
        num_pairs = features.shape[1]
        residual, total, squares = (rows.reshape(-1, num_pairs, len(best)).sum(1) for rows in sums)
        return cls(residual, total, squares, num_pairs)

    def r2(self, weights: Floats) -> Floats:
        """`[a]`, each image counted as often as `[k]` weights say; 0 for a component that doesn't vary then."""
        count = weights.sum() * self.num_pairs
        variance = weights @ self.squares - (weights @ self.total) ** 2 / count
        varies = variance > 1e-12 * count
        return np.where(varies, 1 - weights @ self.residual / np.where(varies, variance, 1), 0)
