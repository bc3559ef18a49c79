"""Antialiased bilinear resize of a crop, in whole numbers.

The same function as torchvision's antialiased bilinear resize and Pillow's `resize(..., BILINEAR)`: a triangle filter
as wide as the scale, first over the rows, then over the columns, rounded to 8 bits after each. Differs: weights have 15
bits instead of Pillow's 22, which changes a value by at most one level and 0.13 levels on average on photographs.

Two makers of the same bits: cykooz_resizer (SIMD, a third of Pillow's time) where it has a wheel, and NumPy's matrix
products (half of Pillow's time). Weights and sums are whole numbers that either holds exactly, so a resized image is the
same on every machine.
"""

import functools

import cv2
import numpy as np
from numpy.typing import NDArray

try:
    import cykooz_resizer
except ImportError:  # a machine for which it has no wheel, such as Linux on ARM
    cykooz_resizer = None

_BLOCK = 8  # rows of one small product; so small that OpenBLAS keeps to the calling thread
_WEIGHT_LIMIT = 1 << 15  # weights are 16-bit numbers with a sign
_MOST_BITS = 21


CLEAN_VIEW = "clean-view-2"
"""names `clean_view` in caches; a change of what it computes needs a new name"""


def clean_view(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The view in which images are measured: `[h w 3]` uint8 as it is, but square, its middle, `[size size 3]`."""
    height, width, _ = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return resize(image[top : top + side, left : left + side], size)


def resize(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resizes `[h w 3]` uint8 to `[size size 3]` uint8, which may be read-only; `image` may be a strided view of a
    larger one."""
    if cykooz_resizer is None:
        return resize_in_numpy(image, size)
    height, width, _ = image.shape
    rgb = cykooz_resizer.PixelType.U8x3
    source = cykooz_resizer.ImageData(width, height, rgb, image.tobytes())
    target = cykooz_resizer.ImageData(size, size, rgb)
    cykooz_resizer.Resizer().resize(source, target, _bilinear())
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(size, size, 3)


def resize_in_numpy(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """`resize` without cykooz_resizer: the same bits in two to three times its time."""
    height, width, channels = image.shape
    rows = _shorten(np.ascontiguousarray(image).reshape(height, -1), size).reshape(size, width, channels)
    # Turned over and back, so that both directions are products from the left: a third of the work of one from the
    # right, which would have to step over the channels.
    columns = _shorten(cv2.transpose(rows).reshape(width, -1), size)
    return cv2.transpose(columns.reshape(size, size, channels))


@functools.cache
def _bilinear() -> "cykooz_resizer.ResizeOptions":
    filter_type = cykooz_resizer.FilterType.bilinear
    return cykooz_resizer.ResizeOptions(cykooz_resizer.ResizeAlg.convolution(filter_type))


def _shorten(rows: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """`[h k]` -> `[size k]`."""
    if len(rows) == size:
        return rows
    starts, weights, one = _bands(len(rows), size)
    values = rows.astype(np.float64)
    sums = np.empty((size, rows.shape[1]))
    for first, start, block in zip(range(0, size, _BLOCK), starts, weights, strict=True):
        np.matmul(
            block[: size - first],
            values[start : start + block.shape[1]],
            out=sums[first : first + _BLOCK],
        )
    return np.clip(np.floor(sums / one + 0.5), 0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=512)
def _bands(length: int, size: int) -> tuple[list[int], NDArray[np.float64], int]:
    """The filter from `length` to `size` pixels, cut into blocks of output rows.

    Returns:
        the first input row of each block; `[k _BLOCK i]` the weights from `i` input rows to a block's
        output rows (the last block may hold unused rows of zeros); the unit of the weights.
    """
    first, weights, one = _triangles(length, size)
    num_blocks = -(-size // _BLOCK)
    starts = first[::_BLOCK].copy()
    stops = np.minimum(np.append(first[_BLOCK::_BLOCK], first[-1]) + weights.shape[1], length)
    num_in = int((stops - starts).max())
    starts = np.minimum(starts, length - num_in)
    bands = np.zeros((num_blocks, _BLOCK, num_in))
    row, tap = weights.nonzero()
    bands[row // _BLOCK, row % _BLOCK, first[row] + tap - starts[row // _BLOCK]] = weights[row, tap]
    return starts.tolist(), bands, one


def _triangles(length: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """For each output pixel its first input pixel `[size]` and its weights `[size t]`, whole numbers; what counts as
    one. Every operation is that of fast_image_resize (precompute_coefficients, Normalizer16), in its order."""
    step = length / size
    reach = max(step, 1.0)
    centre = (np.arange(size) + 0.5) * step
    first = np.maximum(np.floor(centre - reach), 0).astype(np.int64)
    position = first[:, None] + np.arange(2 * int(np.ceil(reach)) + 1)
    distance = np.abs((position - (centre - 0.5)[:, None]) * (1 / reach))
    weight = np.maximum(1 - distance, 0) * (position < length)
    weight /= np.cumsum(weight, axis=1)[
        :, -1:
    ]  # one after another: `sum` adds in pairs and rounds differently
    bits = 0
    while bits < _MOST_BITS and weight.max() * 2 ** (bits + 1) + 0.5 < _WEIGHT_LIMIT:
        bits += 1
    whole, rest = np.divmod(weight * 2**bits, 1)
    return first, (whole + (rest >= 0.5)).astype(np.int64), 2**bits
