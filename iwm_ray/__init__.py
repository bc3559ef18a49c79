"""iwm_ray: train, measure and use Image World Models (arXiv 2403.00504) on a Ray cluster."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iwm_ray.finetuning.adapter import Classifier
    from iwm_ray.segmentation.segmenter import Segmenter

__version__ = "0.1.0"


def load(path: Path | str, task: str = "", run: Path | str | None = None) -> "Classifier | Segmenter":
    """A ready classifier or segmenter: `.fit(image)` makes any image one of its size, `.predict(images)` takes a stack of
    those; `.image_size`, `.class_names`.

    Args:
        path: the folder of an adapter, RUN/finetune/NAME/adapters/ARM; RUN or RUN/finetune/NAME where there is only one.
        task: which of its tasks; needed where it has several.
        run: the run directory of its encoder, where that has moved.

    Raises:
        UsageError: no adapter there, or several, no such task, or the encoder is not the one that it belongs to.
        RunError: its files are damaged.
    """
    # torch takes seconds to load
    from iwm_ray.finetuning import adapter
    from iwm_ray.segmentation import segmenter

    folder, origin = find_adapter(Path(path)), None if run is None else Path(run).expanduser().absolute()
    if (folder / segmenter.FACTS).exists():
        return segmenter.load(folder, origin)
    return adapter.load(folder, task, origin)


def find_adapter(path: Path) -> Path:
    """The folder of an adapter or segmenter: `path` itself, or the only one that lies in a run, or in the folder of a
    tuning.

    Raises:
        UsageError: there is none, or there are several.
    """
    from iwm_ray.errors import UsageError
    from iwm_ray.finetuning import adapter
    from iwm_ray.segmentation import segmenter

    files = (adapter.FACTS, segmenter.FACTS)
    path = path.expanduser().absolute()
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder; give RUN/finetune/NAME/adapters/ARM")
    if any((path / file).exists() for file in files):
        return path
    places = [f"{place}adapters/*/{file}" for place in ("", "finetune/*/") for file in files]
    found = sorted(file.parent for place in places for file in path.glob(place))
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"{path}: holds {len(found)} adapters; give one of them, such as {found[0]}")
    raise UsageError(
        f"{path}: no {adapter.FACTS} and no {segmenter.FACTS} there; give a folder RUN/finetune/NAME/adapters/ARM"
    )
