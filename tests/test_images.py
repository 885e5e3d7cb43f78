"""Decoding: Pillow and transformers' own loading are the oracles."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import draw_image
from PIL import Image
from transformers.image_utils import load_image

from vit_finetune.data.images import EncodedImage, UnreadableImage, decode_image
from vit_finetune.data.sources.folders import is_image_name

PHOTO = draw_image((200, 120, 40), seed=0, size=(37, 26)).resize((74, 52), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def expected(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(load_image(image))


def with_alpha() -> Image.Image:
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, 74).astype(np.uint8), (52, 1)))
    image = PHOTO.copy()
    image.putalpha(alpha)
    return image


ENCODED = {
    "jpeg": encode(PHOTO, "JPEG"),
    "jpeg grey": encode(PHOTO.convert("L"), "JPEG"),
    "jpeg cmyk": encode(PHOTO.convert("CMYK"), "JPEG"),
    "jpeg progressive": encode(PHOTO, "JPEG", progressive=True, subsampling=2),
    "mpo": encode(PHOTO, "MPO", save_all=True, append_images=[PHOTO.rotate(180)]),
    "png": encode(PHOTO, "PNG"),
    "png grey": encode(PHOTO.convert("L"), "PNG"),
    "png palette": encode(PHOTO.quantize(16), "PNG"),
    "png palette with transparency": encode(
        PHOTO.quantize(16), "PNG", transparency=bytes([0, 128] + [255] * 14)
    ),
    "png palette with one transparent colour": encode(PHOTO.quantize(16), "PNG", transparency=3),
    "png rgb with transparent colour": encode(PHOTO, "PNG", transparency=(200, 120, 40)),
    "png rgba": encode(with_alpha(), "PNG"),
    "png la": encode(with_alpha().convert("LA"), "PNG"),
    "png 1 bit": encode(PHOTO.convert("1"), "PNG"),
    "gif": encode(PHOTO, "GIF", save_all=True, append_images=[PHOTO.rotate(180)]),
    "webp": encode(PHOTO, "WEBP"),
    "webp rgba": encode(with_alpha(), "WEBP"),
    "bmp": encode(PHOTO, "BMP"),
    "tiff": encode(PHOTO, "TIFF"),
    "tiff cmyk": encode(PHOTO.convert("CMYK"), "TIFF"),
    "ppm": encode(PHOTO, "PPM"),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")  # the oracle's, not ours
@pytest.mark.parametrize("kind", ENCODED)
def test_pixels_are_those_that_a_pipeline_sees(kind: str) -> None:
    image = decode_image(ENCODED[kind])
    assert image.dtype == torch.uint8
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected(ENCODED[kind]))


@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ENCODED)
def test_a_shrunk_picture_is_the_picture_smaller_or_the_picture(kind: str, shrink: int) -> None:
    """Only JPEG decoders shrink; what they give is close to the mean over each block of pixels."""
    image = EncodedImage(ENCODED[kind])
    whole, small = image.decode().float(), image.decode(shrink)
    assert image.size == tuple(whole.shape[1:]) == (52, 74)
    if tuple(small.shape[1:]) == (52, 74):
        assert shrink == 1 or not kind.startswith(("jpeg", "mpo")) or kind == "jpeg cmyk"
        assert torch.equal(small.float(), whole)
    else:
        assert tuple(small.shape[1:]) == (-(-52 // shrink), -(-74 // shrink))
        means = torch.nn.functional.avg_pool2d(whole, shrink)  # (3, H // shrink, W // shrink)
        inside = small[:, : means.shape[1], : means.shape[2]].float()
        assert (inside - means).abs().mean() < 4  # of 255


@pytest.mark.parametrize("shrink", [1, 2])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_shrunk_jpeg_is_turned_as_the_whole_one(orientation: int, shrink: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = EncodedImage(encode(PHOTO, "JPEG", exif=exif, subsampling=0, quality=95))
    whole, small = image.decode().float(), image.decode(shrink).float()
    assert image.size == tuple(whole.shape[1:])
    assert (small - torch.nn.functional.avg_pool2d(whole, shrink)).abs().mean() < 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(PHOTO, kind, exif=exif)
    image = decode_image(data)
    assert tuple(image.shape) == ((3, 52, 74) if orientation < 5 else (3, 74, 52))
    assert EncodedImage(data).size == tuple(image.shape[1:])
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected(data))


def segment(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload


XMP = b'http://ns.adobe.com/xap/1.0/\0<rdf:Description tiff:Orientation="6"/>'


@pytest.mark.parametrize("place", ["behind long comments", "in XMP"])
def test_orientation_is_found_wherever_pillow_finds_it(place: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    if place == "in XMP":
        header = segment(0xE1, XMP)
    else:
        header = segment(0xFE, b"c" * 65_000) * 2 + segment(0xE1, exif.tobytes())
    data = ENCODED["jpeg"][:2] + header + ENCODED["jpeg"][2:]
    image = decode_image(data)
    assert tuple(image.shape) == (3, 74, 52)
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected(data))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_keep_their_upper_8(kind: str) -> None:
    values = np.linspace(0, 65535, 300).astype(np.uint16).reshape(15, 20)
    image = decode_image(encode(Image.fromarray(values), kind))
    for channel in image:
        np.testing.assert_array_equal(channel.numpy(), values >> 8)


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (b"this is no image, whatever its name says", "not an image"),
        (ENCODED["jpeg"][:-400], "truncated JPEG"),
        (ENCODED["png"][:-2000], "truncated"),
        (ENCODED["tiff"][:-2000], "truncated"),
        (png_header(50_000, 50_000), "decompression bomb"),
    ],
    ids=["empty", "text", "truncated jpeg", "truncated png", "truncated tiff", "bomb"],
)
def test_what_cannot_be_decoded_says_why(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=f"^{reason}"):
        decode_image(data)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow on broken metadata
@pytest.mark.parametrize("kind", ["jpeg", "png palette", "gif", "webp", "bmp", "tiff", "ppm"])
def test_damaged_bytes_give_pixels_or_one_kind_of_error(kind: str) -> None:
    damage = random.Random(kind)
    for _ in range(60):
        data = bytearray(ENCODED[kind][: damage.randrange(20, len(ENCODED[kind]) + 500)])
        for _ in range(damage.randrange(1, 6)):
            data[damage.randrange(min(len(data), damage.choice([40, 400, 10_000])))] = damage.randrange(256)
        try:
            assert decode_image(bytes(data)).shape[0] == 3
        except UnreadableImage as error:
            assert str(error)


def test_any_error_of_a_decoder_becomes_an_unreadable_image(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (
        struct.error("bad"),
        zlib.error("bad"),
        KeyError("bad"),
        TypeError("bad"),
        RuntimeError("bad"),
    ):

        def fail(*args: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(Image.Image, "convert", fail)
        with pytest.raises(UnreadableImage, match="bad"):
            decode_image(ENCODED["png grey"])


def test_image_names() -> None:
    assert all(map(is_image_name, ["a.jpg", "b.JPEG", "c/d.Png", "e.tar.webp", "f.TIF"]))
    assert not any(map(is_image_name, ["a", "jpg", "a.txt", "a.jpg/readme", "a.jpg.part", ""]))
