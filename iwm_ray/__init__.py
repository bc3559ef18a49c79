"""iwm_ray: train, measure and use Image World Models (arXiv 2403.00504) on a Ray cluster."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iwm_ray.finetuning.adapter import Classifier

__version__ = "0.1.0"


def load(path: Path | str, task: str = "", run: Path | str | None = None) -> "Classifier":
    """A ready classifier: `.predict(images)` and `.class_names`.

    Args:
        path: the folder of an adapter, RUN/finetune/NAME/adapters/ARM.
        task: which of its tasks; needed where it has several.
        run: the run directory of its encoder, where that has moved.

    Raises:
        UsageError: no adapter there, no such task, or the encoder is not the one that it belongs to.
    """
    from iwm_ray.finetuning import adapter  # torch takes seconds to load

    return adapter.load(Path(path), task, None if run is None else Path(run))
