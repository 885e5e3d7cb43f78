"""One image file's bytes → RGB pixels, the same ones that `pipeline("image-classification")` sees."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # deprecated since torchvision 0.29, to be removed: Pillow gives the same pixels
    decode_jpeg = None

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".avif", ".jp2"}
    | {".ppm", ".pgm", ".pbm", ".pnm"}
)
"""File name endings, in lower case, that are taken for images."""

# Pillow warns from half of its own limit on; photographs of 100 megapixels are ordinary today. Once for the
# process, because changing filters around each call is not safe in threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# The pixels are read all the same.
warnings.filterwarnings("ignore", "Corrupt EXIF data")
warnings.filterwarnings("ignore", "The image decoding and encoding capabilities of TorchVision")


class UnreadableImage(ValueError):
    """An image that cannot be decoded; its text says why, without the file's name."""


def is_image_name(name: str) -> bool:
    """Whether a file name ends like an image's, in any case."""
    return name[name.rfind(".") :].lower() in SUFFIXES  # pathlib would take a second over 60,000 files


BROKEN = (
    *(OSError, SyntaxError, ValueError, EOFError, ArithmeticError, LookupError, TypeError, RuntimeError),
    *(struct.error, zlib.error),
)
"""What Pillow's decoders raise on broken data."""


def decode_image(data: bytes) -> torch.Tensor:
    """The RGB pixels of an encoded image: uint8 `(3, height, width)`, EXIF orientation applied.

    JPEG goes through torchvision while it has a decoder, which gives exactly Pillow's pixels a third faster;
    all else through Pillow. Greyscale, palette and CMYK become RGB, alpha is dropped, of animations the first
    frame is taken: as `transformers.image_utils.load_image` does. 16 bits per channel keep their upper 8,
    where Pillow's own conversion would turn everything above 255 white.

    Raises:
        UnreadableImage: empty, truncated, not an image, or of so many pixels that it is taken for a
            decompression bomb (above 2 × `PIL.Image.MAX_IMAGE_PIXELS`, about 179 million).
    """
    if not data:
        raise UnreadableImage("0 bytes")
    try:
        image = Image.open(io.BytesIO(data))
        if image.format in ("JPEG", "MPO") and decode_jpeg is not None:
            return _decode_jpeg(data)
        ImageOps.exif_transpose(image, in_place=True)
        return torch.from_numpy(np.array(_to_rgb(image))).permute(2, 0, 1)  # (H, W, 3) in memory → (3, H, W)
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage("not an image") from None
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"decompression bomb: {error}") from None
    except BROKEN as error:
        reason = "truncated" if "truncated" in str(error).lower() else str(error)
        raise UnreadableImage(reason or type(error).__name__) from None


def _decode_jpeg(data: bytes) -> torch.Tensor:
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        image: torch.Tensor = decode_jpeg(encoded, ImageReadMode.RGB, apply_exif_orientation=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        problem = "truncated JPEG" if "incomplete" in reason else f"broken JPEG: {reason}"
        raise UnreadableImage(problem) from None
    return image  # (3, H, W)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        if image.mode != "I" or pixels.max(initial=0) > 255:
            pixels = pixels >> 8
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")  # a palette with transparent entries has no direct way to RGB
    return image if image.mode == "RGB" else image.convert("RGB")
