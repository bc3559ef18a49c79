"""Where the world model errs: the prediction error by component of the action and by strength.

One component at a time is given one strength after the other. A jitter changes the target (the source is the clean
image); a destructive transform changes the source (the target is the clean image), as in training. Nothing is drawn, so
that all models of one policy are asked the same questions.

Two halves, as in mrr.py: `prediction_errors` runs the model, image by image; `error_rows` makes the table of a plot.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iwm_ray.evaluation.features import measuring, model_device
from iwm_ray.evaluation.intervals import Floats, interval
from iwm_ray.model.iwm import IWM
from iwm_ray.views.actions import ActionField
from iwm_ray.views.draws import Draws
from iwm_ray.views.policy import ViewPolicy

NUM_STRENGTHS = 9
"""from one end of a component's range to the other; odd, so that the identity is among them"""


@dataclass(frozen=True)
class Questions:
    """What is asked about every image: one row a component and strength."""

    components: tuple[str, ...]
    """of each row; those of the policy's action that have a strength or a probability"""
    units: tuple[str, ...]
    strengths: Floats
    """`[r]` of the component, in its unit; of the blur the radius in pixels, of solarize the threshold"""
    draws: Draws
    """r rows that make the views"""


def make_questions(policy: ViewPolicy, num_strengths: int = NUM_STRENGTHS) -> Questions:
    """Asks about the components that training varies: jitters of some strength, transforms of some probability."""
    rows: list[tuple[ActionField, float, dict[str, object]]] = []
    for field in policy.target_jitter.fields:
        if field.scale and policy.target_jitter.probability:
            for deviation in np.linspace(-field.scale, field.scale, num_strengths):
                strength = float(np.float32(field.identity + deviation))
                rows.append((field, strength, {"target_jitter": True, f"target_{field.name}": strength}))
    grayscale, blur, solarize = policy.destructive
    if grayscale.probability:
        rows.append((grayscale.fields[0], 1, {"source_grayscale": True}))
    for radius in np.linspace(*blur.radius, max(2, num_strengths // 2)) if blur.probability else ():
        changes: dict[str, object] = {"source_blur": True, "source_blur_radius": radius}
        rows.append((replace(blur.fields[0], unit="pixels"), radius, changes))
    if solarize.probability:
        level = replace(solarize.fields[0], unit="threshold")
        rows.append((level, solarize.threshold, {"source_solarize": True}))
    draws = policy.identity(len(rows))
    for place, (_, _, changes) in enumerate(rows):
        for name, value in changes.items():
            draws[name][place] = value
    names, units = (tuple(getattr(field, name) for field, *_ in rows) for name in ("name", "unit"))
    return Questions(names, units, np.array([strength for _, strength, _ in rows], np.float64), draws)


def prediction_errors(
    model: IWM,
    policy: ViewPolicy,
    images: NDArray[np.uint8],
    numbers: NDArray[np.int64],
    questions: Questions,
    *,
    batch_size: int = 64,
) -> dict[str, NDArray]:
    """Errors for each image and question; an image's row does not depend on the other images.

    Args:
        model: keeps its weights and training flags; runs where it is, under the caller's autocast.
        policy: with which the questions were made.
        images: `[k s s 3]` RGB, clean, of the policy's size; numbers: `[k]`, which they are.
        questions: of `make_questions`.
        batch_size: questions in one forward pass.

    Returns:
        `number` `[k]`; `[k r]` float64 means over tokens and channels of squared differences (the training loss, over
        the whole grid): `error` of the prediction, `null_error` of the prediction with the null action, `distance` of
        the target tokens of source and target view (what a model that changes nothing would err by).
    """
    # Where sources are made from targets, the action would leave the target's jitter out.
    policy = replace(policy, source_base="crop")
    action, device = torch.from_numpy(policy.encode(questions.draws)), model_device(model)
    table = []
    with measuring(model):
        for image in images:
            views = [policy.views(image, questions.draws, row) for row in range(len(action))]
            source, target = (
                torch.from_numpy(np.stack(side)).permute(0, 3, 1, 2) for side in zip(*views, strict=True)
            )
            parts = zip(*(side.split(batch_size) for side in (source, target, action)), strict=True)
            found = [_errors(model, *(side.to(device) for side in part)) for part in parts]
            table.append(torch.cat(found, dim=1))
        columns = torch.stack(table, dim=1).cpu().numpy()
    names = ("error", "null_error", "distance")
    return {"number": np.asarray(numbers)} | dict(zip(names, columns, strict=True))


def _errors(model: IWM, source: Tensor, target: Tensor, action: Tensor) -> Tensor:
    """`[3 b]` float64: error, null error and distance of a batch."""
    tokens = model.target_tokens(target)
    others = (
        model.predict(source, action),
        model.predict(source, torch.zeros_like(action)),
        model.target_tokens(source),
    )
    return torch.stack([(other.double() - tokens.double()).square().mean(dim=(1, 2)) for other in others])


def error_rows(table: Mapping[str, NDArray], questions: Questions, seed: int) -> dict[str, NDArray]:
    """One row for each component and strength, for Parquet and plots.

    Args:
        table: of `prediction_errors`, or several joined.
        questions: with which it was made.
        seed: of the intervals.

    Returns:
        `component`, `unit`, `strength`; means over the images `error`, `null_error` and `distance`;
        `relative_to_null`, error / null_error (below 1: the action helps); `relative_to_distance`, error / distance
        (below 1: better than changing nothing; NaN where source and target are equal). Each figure has the
        ends of its 95 % interval over the images as `..._low` and `..._high`.
    """
    sums = np.stack([table[name] for name in ("error", "null_error", "distance")])  # [3 k r]
    num_images, num_rows = sums.shape[1:]

    def figures(weights: Floats) -> Floats:
        error, null_error, distance = np.einsum("k,ckr->cr", weights, sums) / num_images
        ratios = [
            np.divide(error, by, out=np.full(num_rows, np.nan), where=by > 0) for by in (null_error, distance)
        ]
        return np.concatenate([error, null_error, distance, *ratios])

    low, high = interval(figures, num_images, seed)
    names = ("error", "null_error", "distance", "relative_to_null", "relative_to_distance")
    rows = {
        "component": np.array(questions.components),
        "unit": np.array(questions.units),
        "strength": questions.strengths,
    }
    for ending, values in (("", figures(np.ones(num_images))), ("_low", low), ("_high", high)):
        rows |= {f"{name}{ending}": part for name, part in zip(names, values.reshape(5, -1), strict=True)}
    return rows
