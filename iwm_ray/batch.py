"""The bundle of tensors that one training step needs: the meeting point of views and model."""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One worker's share of a global batch.

    Views are uint8 RGB; the encoder normalises them on the device. A quarantined sample keeps its place with weight 0,
    so that batches stay rectangular, nothing is doubled and the rest of the epoch keeps its order.
    """

    source: Tensor
    """`[b 3 h w]` uint8, the source view"""
    target: Tensor
    """`[b 3 h w]` uint8, the target view"""
    action: Tensor
    """`[b a]` float32, what leads from source to target; zero is the null action"""
    context_idx: Tensor
    """`[b c]` int64, positions of the source patches that the context encoder sees, ascending"""
    target_idx: Tensor
    """`[b t]` int64, positions that are predicted, ascending"""
    weight: Tensor
    """`[b]` float32, 1, or 0 for a quarantined sample"""
    counter: Tensor
    """`[b]` int64, place of the row in the run's stream of samples (data/plan.py)"""

    def __len__(self) -> int:
        return len(self.source)

    def to(self, device: torch.device | str) -> Self:
        """The same batch on `device`; copies from pinned memory do not wait."""
        moved = (getattr(self, field.name).to(device, non_blocking=True) for field in fields(self))
        return type(self)(*moved)

    def split(self, num_parts: int) -> list[Self]:
        """Cuts the batch into equal parts, for gradient accumulation."""
        columns = (getattr(self, field.name).chunk(num_parts) for field in fields(self))
        return [type(self)(*part) for part in zip(*columns, strict=True)]
