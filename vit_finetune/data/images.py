"""One image file's bytes → RGB pixels, the same ones that `pipeline("image-classification")` sees."""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

# Pillow warns from half of its own limit on; photographs of 100 megapixels are ordinary today. Once for the
# process, because changing filters around each call is not safe in threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# The pixels are read all the same.
warnings.filterwarnings("ignore", "Corrupt EXIF data")


class UnreadableImage(ValueError):
    """An image that cannot be decoded; its text says why, without the file's name."""


_ON_ITS_SIDE = (5, 6, 7, 8)
"""Values of EXIF's tag 0x0112 with which height and width change places."""

BROKEN = (
    *(OSError, SyntaxError, ValueError, EOFError, ArithmeticError, LookupError, TypeError, RuntimeError),
    *(struct.error, zlib.error),
)
"""What Pillow's decoders raise on broken data."""


class EncodedImage:
    """One encoded image: its size is known from its header, its pixels only when asked for.

    JPEG goes through libjpeg-turbo by way of simplejpeg, which gives exactly Pillow's pixels faster, and
    smaller pictures much faster; all else, and every JPEG that it is not sure about, goes through Pillow.

    Args:
        data: the file's bytes.

    Raises:
        UnreadableImage: empty, no image, or of so many pixels that it is taken for a decompression bomb
            (above 2 × `PIL.Image.MAX_IMAGE_PIXELS`, about 179 million).
    """

    def __init__(self, data: bytes) -> None:
        if not data:
            raise UnreadableImage("0 bytes")
        self._data, self._orientation, size = data, 1, None
        self._is_jpeg = False
        if data.startswith(b"\xff\xd8"):
            with suppress(ValueError):  # then Pillow says what is wrong with it
                height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
                self._is_jpeg = colours in ("YCbCr", "Gray") and height * width <= _LARGEST
                size = (height, width)
        if not self._is_jpeg or _may_be_turned(data):
            with _explained():
                image = Image.open(io.BytesIO(data))
                self._orientation = image.getexif().get(0x0112, 1)
                size = (image.height, image.width)
                if getattr(image, "tag_v2", {}).get(0x0112) in _ON_ITS_SIDE:
                    size = size[::-1]  # of a TIFF, Pillow tells the size that it will have when turned
        assert size is not None  # one of the two readers told it, or raised
        self._stored = size
        self.size = size[::-1] if self._orientation in _ON_ITS_SIDE else size

    size: tuple[int, int]
    """Height and width in pixels, EXIF orientation applied."""

    @property
    def digest(self) -> str:
        """Hash of the file's content."""
        return hash_content(self._data)

    def decode(self, shrink: int = 1) -> torch.Tensor:
        """The RGB pixels: uint8 `(3, height, width)`, EXIF orientation applied; channels lie last in memory.

        Greyscale, palette and CMYK become RGB, alpha is dropped, of animations the first frame is taken: as
        `transformers.image_utils.load_image` does. 16 bits per channel keep their upper 8, where Pillow's own
        conversion would turn everything above 255 white.

        Args:
            shrink: 1, 2, 4 or 8: where the decoder can (JPEG), the sides come divided by it, rounded up.

        Raises:
            UnreadableImage: truncated or damaged.
        """
        if self._is_jpeg:
            height, width = (-(-side // shrink) for side in self._stored)
            least = {} if shrink == 1 else {"min_height": height, "min_width": width}
            with suppress(ValueError):  # then Pillow decides, as it would in a pipeline
                pixels = torch.from_numpy(simplejpeg.decode_jpeg(self._data, "RGB", **least)).permute(2, 0, 1)
                return _turn(pixels, self._orientation)
        with _explained("JPEG" if self._data.startswith(b"\xff\xd8") else ""):
            image = Image.open(io.BytesIO(self._data))
            ImageOps.exif_transpose(image, in_place=True)
            # (H, W, 3) in memory → (3, H, W)
            return torch.from_numpy(np.array(_to_rgb(image))).permute(2, 0, 1)


def _may_be_turned(data: bytes) -> bool:
    """Whether Pillow could find an orientation in a JPEG: in EXIF or XMP, anywhere before the pixels."""
    place = 2
    while data[place : place + 1] == b"\xff" and data[place + 1 : place + 2] != b"\xda":  # start of scan
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    # Where segments do not follow one another to the pixels, all of the file is searched.
    end = place if data[place : place + 2] == b"\xff\xda" else len(data)
    return any(data.find(mark, 0, end) >= 0 for mark in (b"Exif\0", b"tiff:Orientation"))


def hash_content(data: bytes) -> str:
    """What an image is known by, wherever its file lies: 32 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _turn(image: torch.Tensor, orientation: int) -> torch.Tensor:
    """The image upright: `(3, height, width)`, turned and mirrored as EXIF's tag 0x0112 says."""
    if orientation in _ON_ITS_SIDE:
        image = image.transpose(1, 2)
    flipped = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation)
    return image.flip(flipped) if flipped else image


def decode_image(data: bytes) -> torch.Tensor:
    """The RGB pixels of an encoded image, at full size: uint8 `(3, height, width)`, as `EncodedImage.decode`.

    Raises:
        UnreadableImage: empty, truncated, not an image, or a decompression bomb.
    """
    return EncodedImage(data).decode()


_LARGEST = 2 * (Image.MAX_IMAGE_PIXELS or 0)
"""Pixels above which Pillow refuses an image."""


@contextmanager
def _explained(kind: str = "") -> Iterator[None]:
    """Turns whatever Pillow's decoders raise into an `UnreadableImage` that says why."""
    try:
        yield
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage("not an image") from None
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"decompression bomb: {error}") from None
    except BROKEN as error:
        truncated = "truncated" in str(error).lower()
        reason = f"truncated {kind}".rstrip() if truncated else str(error)
        raise UnreadableImage(reason or type(error).__name__) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        if image.mode != "I" or pixels.max(initial=0) > 255:
            pixels = pixels >> 8
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")  # a palette with transparent entries has no direct way to RGB
    return image if image.mode == "RGB" else image.convert("RGB")
