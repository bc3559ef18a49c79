"""iwm_ray: train, measure and use Image World Models (arXiv 2403.00504) on a Ray cluster."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iwm_ray.finetuning.adapter import Classifier
    from iwm_ray.segmentation.segmenter import Segmenter

__version__ = "0.1.0"


def load(path: Path | str, task: str = "", run: Path | str | None = None) -> "Classifier | Segmenter":
    """A ready classifier or segmenter: `.fit(image)`, `.predict(images)`, `.image_size` and
    `.class_names`.

    Args:
        path: the folder of an adapter, RUN/finetune/NAME/adapters/ARM.
        task: which of its tasks; needed where it has several.
        run: the run directory of its encoder, where that has moved.

    Raises:
        UsageError: no adapter there, no such task, or the encoder is not the one that it belongs to.
    """
    # torch takes seconds to load
    from iwm_ray.finetuning import adapter
    from iwm_ray.segmentation import segmenter

    folder, origin = Path(path), None if run is None else Path(run)
    if (folder / segmenter.FACTS).exists():
        return segmenter.load(folder, origin)
    return adapter.load(folder, task, origin)
