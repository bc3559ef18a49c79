import csv
import io
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from iwm_ray.config import DataConfig
from iwm_ray.data import decode as decode_module
from iwm_ray.data.decode import DecodeLimits, EncodedImage, Undecodable, decode

ANY_SIZE = DecodeLimits(min_side=1)
WHITE = np.array([255, 255, 255])
Pixels = NDArray[np.uint8]


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(
    pixels: NDArray[np.integer], colour_type: int, depth: int = 8, extra: tuple[tuple[bytes, bytes], ...] = ()
) -> bytes:
    """A PNG written by hand: Pillow cannot write 16-bit colour. `pixels` are `[h w channels]` at the file's depth."""
    height, width = pixels.shape[:2]
    if depth == 16:
        rows = pixels.astype(">u2").reshape(height, -1).view(np.uint8)
    elif depth == 8:
        rows = pixels.astype(np.uint8).reshape(height, -1)
    else:
        bits = (pixels.reshape(height, width)[..., None] >> np.arange(depth - 1, -1, -1)) & 1
        rows = np.packbits(bits.astype(np.uint8).reshape(height, -1), axis=1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def orientation_block(orientation: int, order: str = "<", kind: int = 3) -> bytes:
    mark = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(order + "HHIHH", 0x0112, kind, 1, orientation, 0)
    return mark + struct.pack(order + "IH", 8, 1) + entry + bytes(4)


def over(colour: NDArray[Any], alpha: NDArray[Any], background: NDArray[Any] = WHITE) -> NDArray[Any]:
    """The plain formula of transparency, `[h w 3]` floats."""
    share = alpha[..., None] / 255
    return colour * share + background * (1 - share)


def assert_close(pixels: Pixels, expected: NDArray[Any], levels: float) -> None:
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected.astype(float)).max() <= levels


# Every mode, against the colours it was made from


def test_jpeg_is_what_simplejpeg_gives(jpeg: bytes) -> None:
    assert np.array_equal(decode(jpeg, ANY_SIZE), simplejpeg.decode_jpeg(jpeg))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"optimize": True}])
def test_jpeg_variants(photo: Pixels, options: dict[str, Any]) -> None:
    assert_close(decode(save(Image.fromarray(photo), "JPEG", quality=98, **options), ANY_SIZE), photo, 12)


def test_gray_jpeg(photo: Pixels) -> None:
    gray = photo[..., 0]
    decoded = decode(save(Image.fromarray(gray), "JPEG", quality=98), ANY_SIZE)
    assert_close(decoded, np.stack([gray] * 3, axis=-1), 4)


@pytest.mark.parametrize("transform", [None, 2])
def test_cmyk_and_ycck_jpeg_show_their_colours(photo: Pixels, transform: int | None) -> None:
    """Pillow writes Adobe's inverted CMYK; transform 2 in the Adobe marker would mean YCCK."""
    data = save(Image.fromarray(photo).convert("CMYK"), "JPEG", quality=98)
    assert simplejpeg.decode_jpeg_header(data)[2] == "CMYK"
    if transform is None:
        assert_close(decode(data, ANY_SIZE), photo, 6)
        return
    marker = data.index(b"Adobe")
    changed = data[: marker + 11] + bytes([transform]) + data[marker + 12 :]
    assert simplejpeg.decode_jpeg_header(changed)[2] == "YCCK"
    reference = np.asarray(Image.open(io.BytesIO(changed)).convert("RGB"))
    assert_close(decode(changed, ANY_SIZE), reference, 2)


def test_png_modes(photo: Pixels) -> None:
    gray = photo[..., 1]
    alpha = photo[..., 2]
    three = np.stack([gray] * 3, axis=-1)
    assert_close(decode(png(photo, 2), ANY_SIZE), photo, 0)
    assert_close(decode(png(gray, 0), ANY_SIZE), three, 0)
    assert_close(decode(png(np.dstack([gray, alpha]), 4), ANY_SIZE), over(three, alpha), 1)
    assert_close(decode(png(np.dstack([photo, alpha]), 6), ANY_SIZE), over(photo, alpha), 1)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_gray_png_of_few_bits(depth: int) -> None:
    values = (np.arange(12 * 9).reshape(9, 12) * 7) % 2**depth
    expected = np.stack([values * (255 // (2**depth - 1))] * 3, axis=-1)
    assert_close(decode(png(values, 0, depth), ANY_SIZE), expected, 0)
    keyed = decode(
        png(values, 0, depth, ((b"tRNS", struct.pack(">H", 1)),)),
        DecodeLimits(min_side=1, background=(9, 8, 7)),
    )
    assert_close(keyed, np.where((values == 1)[..., None], np.array([9, 8, 7]), expected), 0)


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bit_png_is_scaled_not_saturated(colour_type: int, channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (30, 40, channels))
    decoded = decode(png(values, colour_type, 16), ANY_SIZE)
    colour = values[..., : 1 if channels < 3 else 3] / 257 * np.ones(3)
    expected = colour if channels % 2 else over(colour, values[..., -1] / 257)
    assert_close(decoded, expected, 1.1 if channels % 2 else 2.2)
    assert abs(decoded.mean() - expected.mean()) < 0.7


def test_16_bit_png_with_a_transparent_colour() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (10, 12, 3))
    limits = DecodeLimits(min_side=1, background=(1, 2, 3))
    colour = decode(png(values, 2, 16, ((b"tRNS", struct.pack(">HHH", *values[4, 5])),)), limits)
    gray = decode(png(values[..., 0], 0, 16, ((b"tRNS", struct.pack(">H", values[4, 5, 0])),)), limits)
    for decoded in (colour, gray):
        assert decoded[4, 5].tolist() == [1, 2, 3]
        assert decoded[0, 0, 0] == values[0, 0, 0] >> 8


def test_8_bit_png_with_a_transparent_colour(photo: Pixels) -> None:
    key = struct.pack(">HHH", *photo[3, 4].tolist())
    decoded = decode(png(photo, 2, 8, ((b"tRNS", key),)), ANY_SIZE)
    expected = np.where(np.all(photo == photo[3, 4], axis=2)[..., None], WHITE, photo)
    assert_close(decoded, expected, 0)


def test_palette_png_with_and_without_transparency() -> None:
    numbers = np.arange(90).reshape(9, 10) % 4
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 20, 30]], np.uint8)
    palette = (b"PLTE", colours.tobytes())
    assert_close(decode(png(numbers, 3, 8, (palette,)), ANY_SIZE), colours[numbers], 0)
    for alphas in (bytes([0, 255, 255, 255]), bytes([0, 128, 255, 64]), bytes([255, 0])):
        alpha = np.frombuffer(alphas.ljust(4, b"\xff"), np.uint8)
        decoded = decode(png(numbers, 3, 8, (palette, (b"tRNS", alphas))), ANY_SIZE)
        assert_close(decoded, over(colours, alpha)[numbers], 1)


def test_background_shows_through(photo: Pixels) -> None:
    clear = np.dstack([photo, np.zeros(photo.shape[:2], np.uint8)])
    decoded = decode(png(clear, 6), DecodeLimits(background=(12, 200, 34)))
    assert_close(decoded, np.broadcast_to([12, 200, 34], photo.shape), 0)


def test_webp(photo: Pixels) -> None:
    image = Image.fromarray(photo)
    alpha = photo[..., 0]
    assert_close(decode(save(image, "WEBP", lossless=True), ANY_SIZE), photo, 0)
    assert_close(decode(save(image, "WEBP", quality=99), ANY_SIZE), photo, 40)
    clear = Image.fromarray(np.dstack([photo, alpha]))
    transparent = save(clear, "WEBP", lossless=True, exact=True)
    assert_close(decode(transparent, ANY_SIZE), over(photo, alpha), 1)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_first_frame_of_an_animation(photo: Pixels, kind: str) -> None:
    frames = [Image.fromarray(np.roll(photo, 7 * step, axis=0)) for step in range(3)]
    data = save(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert_close(decode(data, ANY_SIZE), photo, 0)


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_undone(photo: Pixels, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(Image.fromarray(photo), kind, exif=exif.tobytes())
    reference = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert_close(decode(data, ANY_SIZE), np.asarray(reference), 3)
    assert (decode(data, ANY_SIZE).shape[0] > photo.shape[0]) == (orientation >= 5)


@pytest.mark.parametrize(
    "block",
    [
        orientation_block(0),
        orientation_block(9),
        orientation_block(77),
        orientation_block(6, kind=7),
        orientation_block(6)[:15],
        b"II*\0\xff\xff\xff\xff",
        b"",
        b"rubbish in the EXIF block",
    ],
)
def test_invalid_orientation_is_ignored(photo: Pixels, block: bytes) -> None:
    for kind in ("JPEG", "PNG"):
        data = save(Image.fromarray(photo), kind, exif=b"Exif\0\0" + block)
        assert decode(data, ANY_SIZE).shape == photo.shape


def test_orientation_of_either_byte_order_behind_other_segments(jpeg: bytes) -> None:
    for order in "<>":
        body = b"Exif\0\0" + orientation_block(8, order)
        exif = b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
        icc = b"\xff\xe2" + struct.pack(">H", 60_002) + bytes(60_000)
        decoded = decode(jpeg[:2] + icc + b"\xff" + exif + jpeg[2:], ANY_SIZE)
        assert np.array_equal(decoded, np.rot90(decode(jpeg, ANY_SIZE)))


def test_orientation_in_imagemagicks_text_chunk(photo: Pixels) -> None:
    block = b"Exif\0\0" + orientation_block(3)
    text = b"\nexif\n" + str(len(block)).rjust(8).encode() + b"\n" + block.hex().encode() + b"\n"
    data = png(photo, 2, 8, ((b"tEXt", b"Raw profile type exif\0" + text),))
    assert_close(decode(data, ANY_SIZE), photo[::-1, ::-1], 0)


# Refusals


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"\xff", "starts with ff"),
        (b"\xff\xd8", "starts with ff d8"),
        (b"\xff\xd8\xff", "no readable header"),
        (b"\x89PNG\r\n\x1a\n", "no header chunk"),
        (b"RIFF\0\0\0\0WEBP", "no header"),
        (b"RIFF\0\0\0\0WEBPVP8 " + bytes(30), "0x0 pixels"),
        (b"GIF89a" + bytes(50), "a GIF"),
        (b"BM" + bytes(50), "a BMP"),
        (b"II*\0" + bytes(50), "a TIFF"),
        (b"\0\0\0\x1cftypavif" + bytes(50), "AVIF"),
        (b"\x1f\x8b\x08" + bytes(50), "gzip"),
        (b"%PDF-1.4", "a PDF"),
        (b"<!DOCTYPE html><html>404</html>", "HTML"),
        (b"\xef\xbb\xbf  <svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b'{"error": "not found"}', "JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        (bytes(4096), "unknown data"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "unknown data"),
    ],
)
def test_other_data_is_named(data: bytes, reason: str) -> None:
    with pytest.raises(Undecodable, match=reason) as caught:
        decode(data, DecodeLimits())
    assert "\n" not in caught.value.reason
    assert len(caught.value.reason) <= 300


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "PPM", "ICO"])
def test_only_three_formats_reach_a_decoder(photo: Pixels, kind: str) -> None:
    with pytest.raises(Undecodable, match="not a JPEG, PNG or WebP"):
        decode(save(Image.fromarray(photo), kind), DecodeLimits())


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize(
    "make",
    [{"format": "JPEG"}, {"format": "JPEG", "progressive": True}, {"format": "PNG"}, {"format": "WEBP"}],
)
def test_cut_files_raise(photo: Pixels, make: dict[str, Any], share: float) -> None:
    noisy = photo ^ np.random.default_rng(0).integers(0, 32, photo.shape, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, **make)
    with pytest.raises(Undecodable):
        decode(buffer.getvalue()[: int(len(buffer.getvalue()) * share)], ANY_SIZE)


def test_jpeg_without_end_mark_is_whole(jpeg: bytes) -> None:
    assert jpeg.endswith(b"\xff\xd9")
    assert np.array_equal(decode(jpeg[:-2], ANY_SIZE), decode(jpeg, ANY_SIZE))


def test_bytes_behind_the_image_are_ignored(jpeg: bytes, photo: Pixels) -> None:
    assert np.array_equal(decode(jpeg + bytes(3000), ANY_SIZE), decode(jpeg, ANY_SIZE))
    assert np.array_equal(decode(jpeg + jpeg, ANY_SIZE), decode(jpeg, ANY_SIZE))
    assert np.array_equal(decode(png(photo, 2) + b"trailing", ANY_SIZE), photo)


def test_junk_between_jpeg_markers_is_harmless(jpeg: bytes) -> None:
    """As some cameras write it; the strict decoder refuses, viewers show the picture."""
    tables = jpeg.index(b"\xff\xdb")
    decoded = decode(jpeg[:tables] + b"\x01\x02\x03\x04\x05" + jpeg[tables:], ANY_SIZE)
    assert_close(decoded, decode(jpeg, ANY_SIZE), 4)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(8, 150), st.integers(8, 60)),
    bottom=st.integers(1, 150),
    subsampling=st.sampled_from(["444", "422", "420", "440", "411", "Gray"]),
    orientation=st.sampled_from([1, 1, 2, 3, 6]),
)
def test_the_top_of_a_jpeg_is_that_of_the_whole(
    size: tuple[int, int], bottom: int, subsampling: str, orientation: int
) -> None:
    height, width = size
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    kind = "Gray" if subsampling == "Gray" else "RGB"
    data = simplejpeg.encode_jpeg(pixels[..., :1].copy() if kind == "Gray" else pixels, 90, kind, subsampling)
    block = b"Exif\0\0" + orientation_block(orientation)
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]
    top, whole = EncodedImage.open(data, ANY_SIZE).pixels(bottom), decode(data, ANY_SIZE)
    assert top.shape == whole.shape
    assert np.array_equal(top[:bottom], whole[:bottom])


@pytest.mark.parametrize(("subsampling", "bottom"), [("444", 32), ("420", 31)])
def test_rows_below_the_wanted_ones_are_not_decoded(
    subsampling: str, bottom: int, photo: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = simplejpeg.encode_jpeg(photo, colorsubsampling=subsampling)
    whole, image = decode(data, ANY_SIZE), EncodedImage.open(data, ANY_SIZE)
    monkeypatch.setattr(decode_module, "decode", None)
    assert np.array_equal(image.pixels(bottom)[:bottom], whole[:bottom])
    with pytest.raises(TypeError):
        image.pixels(bottom + 1)


@pytest.mark.parametrize("make", [{"progressive": True}, {"restart_marker_rows": 1}, {"optimize": True}])
def test_the_top_of_other_jpegs(make: dict[str, Any], photo: Pixels) -> None:
    data = save(Image.fromarray(photo), "JPEG", **make)
    assert np.array_equal(EncodedImage.open(data, ANY_SIZE).pixels(9)[:9], decode(data, ANY_SIZE)[:9])


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_cut_files_raise_whatever_is_wanted_of_them(share: float, photo: Pixels, jpeg: bytes) -> None:
    image = EncodedImage.open(jpeg[: int(len(jpeg) * share)], ANY_SIZE)
    with pytest.raises(Undecodable):
        image.pixels(8)
    whole = EncodedImage.open(jpeg[:-2], ANY_SIZE)  # but for the end mark
    assert np.array_equal(whole.pixels(8)[:8], decode(jpeg, ANY_SIZE)[:8])


def test_damage_in_the_pixels_of_a_jpeg_is_found(jpeg: bytes) -> None:
    start = jpeg.index(b"\xff\xda") + 40
    with pytest.raises(Undecodable, match="JPEG"):
        decode(jpeg[:start] + b"\xff\xd0\xff\xd3" + jpeg[start + 4 :], ANY_SIZE)


def test_damaged_png_never_ends_the_process(photo: Pixels) -> None:
    """torchvision's decoder dies of this one."""
    data = bytearray(png(photo, 2))
    data[data.index(b"IDAT") + 20] ^= 0xFF
    with pytest.raises(Undecodable, match="PNG"):
        decode(bytes(data), ANY_SIZE)


def header_of(kind: str, width: int, height: int, jpeg: bytes) -> bytes:
    """A file that declares a size and holds next to nothing."""
    if kind == "jpeg":
        frame = jpeg.index(b"\xff\xc0")
        return jpeg[: frame + 5] + struct.pack(">HH", height, width) + jpeg[frame + 9 :]
    if kind == "png":
        ihdr = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
        return (
            b"\x89PNG\r\n\x1a\n"
            + struct.pack(">I", 13)
            + b"IHDR"
            + ihdr
            + struct.pack(">I", zlib.crc32(b"IHDR" + ihdr))
            + bytes(20)
        )
    if kind == "webp extended":
        size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        return b"RIFF\x40\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + size + bytes(40)
    if kind == "webp lossless":
        bits = (width - 1) | (height - 1) << 14
        return b"RIFF\x40\0\0\0WEBPVP8L\x0a\0\0\0\x2f" + bits.to_bytes(4, "little") + bytes(40)
    return (
        b"RIFF\x40\0\0\0WEBPVP8 \x20\0\0\0\0\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height) + bytes(40)
    )


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp extended", "webp lossless", "webp lossy"])
def test_bombs_are_refused_by_their_header(kind: str, jpeg: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **options: object) -> None:
        raise AssertionError("a decoder was called")

    monkeypatch.setattr("iwm_ray.data.decode.simplejpeg.decode_jpeg", never)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.__init__", never)
    monkeypatch.setattr("PIL.WebPImagePlugin.WebPImageFile.__init__", never)
    with pytest.raises(Undecodable, match=r"16000x15000 pixels, more than data.max_pixels 50000000"):
        decode(header_of(kind, 16000, 15000, jpeg), DecodeLimits())
    with pytest.raises(Undecodable, match=r"16000x2 pixels: the shorter side is below data.min_side 8"):
        decode(header_of(kind, 16000, 2, jpeg), DecodeLimits())


def test_a_second_png_header_does_not_pass_the_limit(photo: Pixels) -> None:
    liar = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    with pytest.raises(Undecodable):
        decode(png(photo, 2, 8, ((b"IHDR", liar),)), DecodeLimits())


def test_text_bomb_is_refused(photo: Pixels) -> None:
    text = b"Comment\0\0" + zlib.compress(bytes(50_000_000))
    with pytest.raises(Undecodable, match="PNG"):
        decode(png(photo, 2, 8, ((b"zTXt", text),)), DecodeLimits())


def test_limits_come_from_the_configuration() -> None:
    data = DataConfig(max_pixels=99, min_side=3, background=(1, 2, 3))
    assert DecodeLimits.from_config(data) == DecodeLimits(99, 3, (1, 2, 3))


def test_pillows_own_limit_raises_no_warning(photo: Pixels, monkeypatch: pytest.MonkeyPatch) -> None:
    """It warns from 89 megapixels on, whatever our own limit is; lowered here, because such images take seconds."""
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", photo.size // 4)
    webp = save(Image.fromarray(photo), "WEBP")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in (png(photo, 2), webp):
            assert decode(data, ANY_SIZE).shape == photo.shape
        monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 10)
        assert decode(png(photo, 2), ANY_SIZE).shape == photo.shape
        with pytest.raises(Undecodable, match="WEBP: Image size"):
            decode(webp, ANY_SIZE)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damage_ends_as_pixels_or_undecodable(data: st.DataObject, photo: Pixels, jpeg: bytes) -> None:
    image = Image.fromarray(photo)
    kinds: list[Callable[[], bytes]] = [
        lambda: jpeg,
        lambda: png(np.dstack([photo, photo[..., 0]]), 6),
        lambda: save(image.quantize(16), "PNG", transparency=3),
        lambda: save(image, "WEBP"),
        lambda: save(image, "PNG", exif=b"Exif\0\0" + orientation_block(6)),
    ]
    damaged = bytearray(data.draw(st.sampled_from(kinds))())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    del damaged[data.draw(st.integers(0, len(damaged))) :]
    try:
        pixels = decode(bytes(damaged), DecodeLimits(max_pixels=1_000_000))
    except Undecodable:
        return
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3


# The collection of bad and odd files beside the repository

_CORRUPT = Path(__file__).parents[3] / "shared" / "data" / "corrupt"
# What the manifest leaves open, decided by looking at the pictures.
_WHOLE = {"made/missing_eoi.jpg", "made/arithmetic.jpg"}
_DAMAGED = {
    "made/bitflips_scan.jpg",  # stripes of wrong colours
    "wild/hopper_bad_exif.jpg",  # black and white stripes
    "wild/ultrahdr.jpg",  # cut
    "wild/truncated_end_chunk.png",
    "wild/truncated_image.png",
    "wild/broken_data_stream.png",
    "wild/png_decompression_dos.png",
}
_MAGICS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF")


def manifest() -> list[tuple[str, str]]:
    if not _CORRUPT.is_dir():
        return []
    with open(_CORRUPT / "MANIFEST.csv", newline="", encoding="utf-8") as file:
        rows = [(row["file"], row["kind"]) for row in csv.DictReader(file)]
    return [row for row in rows if row[1] not in ("shard", "skip")]


def expected_to_decode(name: str, kind: str, data: bytes) -> bool:
    if not data.startswith(_MAGICS):
        return False  # formats that are not read, whatever their quality
    return name not in _DAMAGED and (kind in ("good", "wild") or name in _WHOLE)


@pytest.mark.parametrize(("name", "kind"), manifest())
def test_collection_of_odd_files(name: str, kind: str) -> None:
    data = (_CORRUPT / name).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if not expected_to_decode(name, kind, data):
            with pytest.raises(Undecodable):
                decode(data, ANY_SIZE)
            return
        pixels = decode(data, ANY_SIZE)
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data + b"\xff\xd9" * (name in _WHOLE))))
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    clear = image.convert("RGBA")
    reference = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), clear)
    assert_close(pixels, np.asarray(reference.convert("RGB")), 4)


def test_no_heavy_module_is_loaded() -> None:
    """Every data task imports this package: torch alone would cost it seconds."""
    code = (
        "import sys, iwm_ray.data.read, iwm_ray.data.plan, iwm_ray.data.photos\n"
        "print(sorted({'torch', 'ray', 'mlflow', 'skimage', 'sklearn', 'scipy', 'pandas'} & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert found.stdout.strip() == "[]"
