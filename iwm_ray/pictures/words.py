"""An action in words."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from iwm_ray.views.actions import ActionField


def action_words(action: NDArray[np.float32], schema: Sequence[ActionField]) -> list[str]:
    """What an action does, one phrase a component that does something, in physical units.

    Args:
        action: `[a]`, coded as the predictor sees it.
        schema: the policy's.

    Returns:
        phrases such as `brightness +0.32`, `hue −0.05 turns`, `undo blur`; `nothing` for the null action.
    """
    phrases = [_phrase(float(value), field) for value, field in zip(action, schema, strict=True) if value]
    return phrases or ["nothing"]


def amount(value: float, field: ActionField) -> str:
    """A component in physical units, signed; `yes` for a flag that is set."""
    if field.unit == "flag":
        return "yes" if value else "no"
    unit = "" if field.unit == "factor" else f" {field.unit}"
    return f"{value * field.scale:+.2f}{unit}".replace("-", "\N{MINUS SIGN}")


def _phrase(value: float, field: ActionField) -> str:
    return f"undo {field.name}" if field.unit == "flag" else f"{field.name} {amount(value, field)}"
