"""Encoded bytes -> uint8 RGB pixels, as a person sees the picture.

JPEG, PNG and WebP are told by their first bytes, never by a name, and nothing else is handed to a decoder:
the other forty formats of an imaging library are forty more ways into the process. Sizes are read from the
header before a pixel is decoded. EXIF orientation is applied, transparency laid over a background, 16 bits
scaled to 8. Colour profiles are left as they are: pixels are taken for sRGB, as torchvision and every
published pipeline do.

Every failure is one exception, `Undecodable`, so that a bad sample can be set aside instead of ending a run.
"""

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self, cast

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL.Image import DecompressionBombError, Image
from PIL.Image import new as new_image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from iwm_ray.config import DataConfig

Pixels = NDArray[np.uint8]

_JPEG_START = b"\xff\xd8\xff"
_END_OF_IMAGE = b"\xff\xd9"
_BASELINE, _SCAN, _RESTARTS, _EXIF = 0xC0, 0xDA, 0xDD, 0xE1  # markers of a JPEG's segments
_REST_PASSED_OVER = "extraneous bytes before marker 0xd9"
_CMYK = ("CMYK", "YCCK")
_ORIENTATION_TAG, _SHORT = 0x0112, 3
_FIRST_TRANSPOSED = 5  # EXIF orientations from here on swap rows and columns
_FLIPS = {
    2: 1,
    3: -1,
    4: 0,
    6: 1,
    7: -1,
    8: 0,
}  # EXIF orientation -> axis of cv2.flip, after transposing from 5 on
# What Pillow's three decoders raise on damaged input (seen in 600,000 damaged files, or plain in the source);
# warnings, which `python -W error` turns into exceptions, can still come from chunks behind the pixels.
_PILLOW_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError),
    *(OverflowError, MemoryError, struct.error, zlib.error, DecompressionBombError, Warning),
)
_OTHER_FORMATS = (
    (b"GIF8", "a GIF"),
    (b"BM", "a BMP"),
    (b"II*\0", "a TIFF"),
    (b"MM\0*", "a TIFF"),
    (b"\0\0\1\0", "an icon"),
    (b"\x1f\x8b", "gzip data: unpack it first"),
    (b"%PDF", "a PDF"),
    (b"version https://git-lfs", "a git-LFS pointer: run `git lfs pull`"),
    (b"<", "HTML, SVG or XML text"),
    (b"{", "JSON text"),
)
_pillow_lock = threading.Lock()


class Undecodable(Exception):  # noqa: N818 - a verdict on a sample, not a fault of the program
    """A sample that cannot be read or decoded; `reason` is one line for the quarantine record."""

    def __init__(self, reason: str) -> None:
        self.reason = " ".join(reason.split())[:300]
        super().__init__(self.reason)


@dataclass(frozen=True)
class DecodeLimits:
    """What is refused before it is decoded, and the colour behind transparent pixels (config.DataConfig)."""

    max_pixels: int = 50_000_000
    """height x width that a header may declare"""
    min_side: int = 8
    """shortest side, pixels"""
    background: tuple[int, int, int] = (255, 255, 255)
    """RGB, 0-255"""

    @classmethod
    def from_config(cls, data: DataConfig) -> Self:
        """The limits of a run."""
        return cls(data.max_pixels, data.min_side, data.background)

    def check(self, height: int, width: int) -> None:
        """Raises Undecodable for an image of `height` x `width` pixels outside the limits."""
        if height * width > self.max_pixels:
            raise Undecodable(
                f"declares {width}x{height} pixels, more than data.max_pixels {self.max_pixels}"
            )
        if min(height, width) < self.min_side:
            raise Undecodable(
                f"{width}x{height} pixels: the shorter side is below data.min_side {self.min_side}"
            )


@dataclass(frozen=True)
class EncodedImage:
    """An image whose size is known before its pixels are: parameters can be drawn for many images at once while
    the pixels of only one are held."""

    height: int
    """of the upright image, pixels"""
    width: int
    data: bytes
    limits: DecodeLimits
    decoded: Pixels | None = None
    orientation: int = 1

    @classmethod
    def open(cls, data: bytes, limits: DecodeLimits) -> Self:
        """Reads a JPEG's header; other formats tell their size for sure only once they are decoded.

        Raises:
            Undecodable: as `decode`; damage behind a JPEG's header is found by `pixels`.
        """
        if not data.startswith(_JPEG_START):
            pixels = decode(data, limits)
            height, width, _ = pixels.shape
            return cls(height, width, data, limits, pixels)
        height, width, _ = _jpeg_header(data, limits)
        orientation = _orientation(_jpeg_exif(data))
        if orientation >= _FIRST_TRANSPOSED:
            height, width = width, height
        return cls(height, width, data, limits, orientation=orientation)

    def pixels(self, bottom: int | None = None) -> Pixels:
        """`[height width 3]` uint8, as `decode` returns them.

        Args:
            bottom: the rows from here on hold anything; None: all rows are wanted. Only for an image that was whole
                before: a decoder that is out of step notices it at the end, if at all, also for the rows above.

        Raises:
            Undecodable: the pixels are damaged or cut.
        """
        if self.decoded is not None:
            return self.decoded
        if bottom is not None and self.orientation == 1:
            pixels = _decode_top(self.data, bottom, self.height, self.width)
            if pixels is not None:
                return pixels
        return decode(self.data, self.limits)


def decode(data: bytes, limits: DecodeLimits) -> Pixels:
    """Decodes a JPEG, PNG or WebP image; of an animation the first frame.

    Args:
        data: the whole encoded file.
        limits: size limits and background.

    Returns:
        `[h w 3]` uint8 RGB, contiguous, turned upright by its EXIF orientation.

    Raises:
        Undecodable: damaged or cut data, another format, a size outside the limits. Nothing else.
    """
    if data.startswith(_JPEG_START):
        pixels = _decode_jpeg(data, limits)
        exif = _jpeg_exif(data)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        pixels, exif = _decode_with_pillow(PngImageFile, data, _png_size(data), limits)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        pixels, exif = _decode_with_pillow(WebPImageFile, data, _webp_size(data), limits)
    else:
        raise Undecodable(f"not a JPEG, PNG or WebP image but {_describe(data)}")
    return _upright(pixels, _orientation(exif)) if exif else pixels


def fault(data: bytes | Undecodable, limits: DecodeLimits) -> str:
    """Why an image can't be decoded, or read (see Reader.read_many); empty where it can."""
    try:
        if isinstance(data, Undecodable):
            raise data
        decode(data, limits)
    except Undecodable as verdict:
        return verdict.reason
    return ""


def _describe(data: bytes) -> str:
    """What the bytes seem to be instead."""
    if not data:
        return "empty (0 bytes)"
    if data[4:8] == b"ftyp":
        return "an AVIF, HEIC or video file"
    start = data[:256].lstrip(b"\xef\xbb\xbf \t\r\n")
    for magic, name in _OTHER_FORMATS:
        if start.startswith(magic) or data.startswith(magic):
            return name
    return f"unknown data (starts with {data[:8].hex(' ')})"


# JPEG


def _decode_jpeg(data: bytes, limits: DecodeLimits) -> Pixels:
    _, _, colorspace = _jpeg_header(data, limits)
    try:
        if colorspace in _CMYK:
            return _rgb_of_inverted_cmyk(simplejpeg.decode_jpeg(data, "CMYK"))
        return simplejpeg.decode_jpeg(data)
    except ValueError as fault:
        return _decode_faulty_jpeg(data, str(fault), limits)


def _decode_top(data: bytes, bottom: int, height: int, width: int) -> Pixels | None:
    """The image down to the row `bottom`, the rest uninitialised; None: decode it whole, for it is of a rarer kind, has
    hardly a row less, or a fault.

    No library offers this, so the header is told that the image ends there. The decoder then passes over the bytes that
    are left and warns of them, but only if it has warned of nothing before; it still looks for the file's end.
    """
    segments = {marker: start for marker, start, _ in _jpeg_segments(data)}
    frame, scan = segments.get(_BASELINE), segments.get(_SCAN)
    if frame is None or scan is None or _RESTARTS in segments:
        return None
    num_channels = data[frame + 5]
    if num_channels > 3 or data[scan] != num_channels:  # CMYK; one scan for each channel
        return None
    rows_of_chroma = max(data[frame + 7 + 3 * channel] & 15 for channel in range(num_channels))
    unit = 8 * rows_of_chroma
    # Where chroma has fewer rows, it is interpolated with the next one.
    num_rows = -(-(bottom + rows_of_chroma - 1) // unit) * unit
    if num_rows >= height:
        return None
    shortened = bytearray(data)
    struct.pack_into(">H", shortened, frame + 1, num_rows)
    pixels = np.empty((height, width, 3), np.uint8)
    try:
        simplejpeg.decode_jpeg(shortened, buffer=pixels)
    except ValueError as warning:
        if _REST_PASSED_OVER not in str(warning):
            return None
    return pixels


def _jpeg_header(data: bytes, limits: DecodeLimits) -> tuple[int, int, str]:
    """(height, width, colour space) of the pixels as they are stored."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):
        raise Undecodable("JPEG: no readable header") from None
    limits.check(height, width)
    return height, width, colorspace


def _decode_faulty_jpeg(data: bytes, fault: str, limits: DecodeLimits) -> Pixels:
    """Decodes a JPEG at which the strict decoder complained, if its pixels are whole.

    Two harmless faults occur in the wild: a missing end marker after complete pixel data (the decoder has no
    complaint once it is added; cut pixel data still raises) and odd bytes between the markers of the header.
    Everything else means wrong pixels.
    """
    try:
        if "Premature end of JPEG file" in fault:
            return simplejpeg.decode_jpeg(data + _END_OF_IMAGE)
        simplejpeg.decode_jpeg_header(data)
    except ValueError:
        if "Premature end of JPEG file" not in fault:
            return _decode_with_pillow(JpegImageFile, data, None, limits)[0]
    raise Undecodable(f"JPEG: {fault}")


def _rgb_of_inverted_cmyk(cmyk: Pixels) -> Pixels:
    """`[h w 4]` -> `[h w 3]`. Files hold 255 - ink (Adobe's convention, which browsers take for granted)."""
    black = cmyk[..., 3].astype(np.uint16)
    rgb = np.empty((*cmyk.shape[:2], 3), np.uint8)
    for channel in range(3):
        rgb[..., channel] = (cmyk[..., channel] * black + 127) // 255
    return rgb


def _jpeg_exif(data: bytes) -> bytes:
    """The EXIF block, or nothing."""
    for marker, start, stop in _jpeg_segments(data):
        if marker == _EXIF and data[start : start + 6] == b"Exif\0\0":
            return data[start + 6 : stop]
    return b""


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, first byte, last byte + 1) of each segment up to the pixels; a walk of a few microseconds."""
    position, end = 2, len(data) - 10
    while position < end and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # markers may be padded
            position += 1
            continue
        stop = position + 2 + (data[position + 2] << 8) + data[position + 3]
        yield marker, position + 4, stop
        if marker in (_SCAN, _END_OF_IMAGE[1]):
            break
        position = stop


# PNG and WebP


def _png_size(data: bytes) -> tuple[int, int]:
    """(height, width) from the header chunk."""
    if data[12:16] != b"IHDR" or len(data) < 29:
        raise Undecodable("PNG: no header chunk")
    width, height = struct.unpack_from(">II", data, 16)
    return height, width


def _webp_size(data: bytes) -> tuple[int, int]:
    """(height, width) of the canvas: the library allocates it before it tells the size."""
    chunk = data[12:16]
    if len(data) < 30 or chunk not in (b"VP8 ", b"VP8L", b"VP8X"):
        raise Undecodable("WebP: no header")
    if chunk == b"VP8X":
        return 1 + int.from_bytes(data[27:30], "little"), 1 + int.from_bytes(data[24:27], "little")
    if chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF)
    width, height = struct.unpack_from("<HH", data, 26)
    return height & 0x3FFF, width & 0x3FFF


def _decode_with_pillow(
    plugin: type[ImageFile], data: bytes, size: tuple[int, int] | None, limits: DecodeLimits
) -> tuple[Pixels, bytes]:
    """Pixels `[h w 3]` and EXIF block.

    The plugin is called directly: `PIL.Image.open` warns at its own pixel limits, which may be below ours.
    Warnings about odd metadata are kept away from the user, whose samples are fine or quarantined.
    """
    if size is not None:
        limits.check(*size)
    name = plugin.format or ""
    try:
        with _pillow_lock, warnings.catch_warnings():  # the list of warning filters is shared by all threads
            warnings.simplefilter("ignore")
            image = plugin(io.BytesIO(data))
        limits.check(image.height, image.width)  # a second header chunk may have changed it
        image.load()
        depth = data[24] if plugin is PngImageFile else 8
        return _rgb(image, depth, limits.background), _pillow_exif(image)
    except _PILLOW_ERRORS as error:
        raise Undecodable(f"{name}: {error or type(error).__name__}") from None


def _pillow_exif(image: ImageFile) -> bytes:
    """EXIF block of a PNG or WebP; ImageMagick used to write it into a PNG's text as hexadecimal digits."""
    exif = image.info.get("exif", b"")
    if not exif and "Raw profile type exif" in image.info:
        exif = bytes.fromhex("".join(image.info["Raw profile type exif"].split("\n")[3:]))
    return exif.removeprefix(b"Exif\0\0")


def _rgb(image: Image, depth: int, background: tuple[int, int, int]) -> Pixels:
    """Any mode of the three formats -> `[h w 3]`, laid over the background; `depth`: bits a channel."""
    key = image.info.get("transparency")
    if image.mode in ("P", "LA") or (image.mode == "L" and key is None):
        image = image.convert("RGBA" if image.mode == "LA" or key is not None else "RGB")
        key = None
    if image.mode == "RGBA":
        opaque = new_image("RGB", image.size, background)
        opaque.paste(image, mask=image.getchannel("A"))
        return np.array(opaque)
    if image.mode not in ("1", "L", "I;16", "RGB", "CMYK"):
        raise ValueError(f"unsupported mode {image.mode}")
    values = np.array(image.convert("RGB") if image.mode == "CMYK" else image)
    if image.mode == "1":
        values = values * np.uint8(255)
    transparent = None if key is None else _equals_key(values, key, depth)
    if values.dtype == np.uint16:
        values = (values >> 8).astype(
            np.uint8
        )  # as Pillow does for 16-bit colour: 0..65535 -> 0..255, mean kept
    rgb = values if values.ndim == 3 else np.repeat(values[..., None], 3, axis=2)
    if transparent is not None:
        rgb[transparent] = background
    return rgb


def _equals_key(
    values: NDArray[np.integer], key: int | tuple[int, int, int], depth: int
) -> NDArray[np.bool_]:
    """`[h w]`: where a PNG has its one transparent colour, which is given at the file's own depth."""
    if values.ndim == 3:
        colour = np.asarray(key) >> (8 if depth == 16 else 0)
        return np.all(values == colour, axis=2)
    scale = {2: 85, 4: 17}.get(depth, 1)  # Pillow widens 2 and 4 bits to 8, but not their key
    return values == np.asarray(key) * scale


# Orientation


def _orientation(exif: bytes) -> int:
    """EXIF orientation, 1 to 8; 1 (upright) where it is missing, invalid or the block is damaged."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", exif, 4)
        (num_entries,) = struct.unpack_from(order + "H", exif, directory)
        for entry in range(num_entries):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", exif, directory + 2 + 12 * entry)
            if tag == _ORIENTATION_TAG:
                return value if kind == _SHORT and 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undoes the turn and mirroring that the camera noted; OpenCV takes a third of numpy's time."""
    if orientation >= _FIRST_TRANSPOSED:  # rows and columns change places
        pixels = cast(Pixels, cv2.transpose(pixels))
    axis = _FLIPS.get(orientation)
    return pixels if axis is None else cast(Pixels, cv2.flip(pixels, axis))
