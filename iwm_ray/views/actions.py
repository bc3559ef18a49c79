"""What the predictor is told: the coding of an action's components."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ActionField:
    """One component of the action (METHOD: action, 7 numbers by default)."""

    name: str
    unit: str
    identity: float
    """the parameter's value that changes nothing, in `unit`"""
    scale: float
    """the parameter's strength, in `unit`: a deviation of this size is coded as 1. 0: the parameter is never
    drawn and its component is always 0; it keeps its place, so that one network fits runs that differ in a
    strength"""

    def encode(self, values: NDArray) -> NDArray[np.float32]:
        """`[b]` values in `unit` -> `[b]` float32 deviations from the identity, in multiples of the scale."""
        if self.scale == 0:
            return np.zeros(len(values), np.float32)
        return (values.astype(np.float32) - np.float32(self.identity)) / np.float32(self.scale)
