"""Training and test images: what must hold of them, so that a figure is not better than the model."""

import numpy as np
from numpy.typing import NDArray

from iwm_ray.data.decode import DecodeLimits, fault
from iwm_ray.data.index import Index
from iwm_ray.data.read import Reader, content_hash
from iwm_ray.errors import UsageError


def refuse_shared_images(
    words: str, train: Index, trained: NDArray[np.int64], test: Index, tested: NDArray[np.int64]
) -> None:
    """Finds test images that are training images: the same sets, or the same files and rows; no image is read but the few
    of `content_hash`, so that a copy of a single file goes unseen.

    Args:
        words: the setting that names the test images.
        train: where training images come from.
        trained: `[k]` their sample numbers.
        test: where test images come from.
        tested: `[m]` their sample numbers.

    Raises:
        UsageError: there are some.
    """
    if content_hash(train) == content_hash(test):
        raise UsageError(f"{words}: holds the training images; give images that are not trained on")
    ours, theirs = f"{train.source}/", f"{test.source}/"
    if not ours.startswith(theirs) and not theirs.startswith(ours):  # apart: no need to look at each file
        return
    judged = {test.origin(i) for i in map(int, tested)}
    shared = [i for i in map(int, trained) if train.origin(i) in judged]
    if shared:
        raise UsageError(
            f"{words}: {len(shared)} of {len(tested)} images are training images too, such as {train.row_id(shared[0])} "
            f"of {train.source}; give images that are not trained on"
        )


def refuse_unknown_classes(words: str, train: Index, test: Index) -> None:
    """Raises UsageError where a test image has a class that no training image has: left out, it would flatter.

    Args:
        words: the setting that names the test images.
        train: training images.
        test: test images.
    """
    learned = [train.class_names[number] for number in np.unique(train.labels) if number >= 0]
    unknown = np.unique(test.labels[(test.labels >= 0) & (test.labels_in(learned) < 0)])
    if len(unknown):
        raise UsageError(
            f"{words}: class {test.class_names[unknown[0]]} is not among the training images; "
            "give test images of the training classes"
        )


def refuse_unreadable(words: str, index: Index, tried: NDArray[np.int64], limits: DecodeLimits) -> None:
    """Raises UsageError where none of a few images can be decoded: the rest is hardly better.

    Args:
        words: the setting that names the images.
        index: where they come from.
        tried: `[k]` sample numbers.
        limits: of the decoder.
    """
    reasons = [fault(data, limits) for data in Reader(index).read_many(tried)]
    if not all(reasons):
        return
    raise UsageError(
        f"{words}: none of {len(tried)} images tried can be read, e.g. {index.row_id(int(tried[0]))}: {reasons[0]}; give "
        "other images"
    )
