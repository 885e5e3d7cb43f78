"""One image file's bytes → RGB pixels, the same ones that `pipeline("image-classification")` sees."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_jpeg

SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2"]
)
"""File name endings, in lower case, that are taken for images."""

# Pillow warns from half of its own limit on; photographs of 100 megapixels are ordinary today. Once for the process,
# because changing filters around each call is not safe in threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UnreadableImage(ValueError):
    """An image that cannot be decoded; its text says why, without the file's name."""


def is_image_name(name: str) -> bool:
    """Whether a file name ends like an image's, in any case."""
    return Path(name).suffix.lower() in SUFFIXES


def decode_image(data: bytes) -> torch.Tensor:
    """The RGB pixels of an encoded image: uint8 `(3, height, width)`, EXIF orientation applied.

    JPEG goes through torchvision, which gives exactly Pillow's pixels a third faster; all else through Pillow.
    Greyscale, palette and CMYK become RGB, alpha is dropped, of animations the first frame is taken: as
    `transformers.image_utils.load_image` does. 16 bits per channel keep their upper 8, where Pillow's own
    conversion would turn everything above 255 white.

    Raises:
        UnreadableImage: empty, truncated, not an image, or of so many pixels that it is taken for a
            decompression bomb (above 2 × `PIL.Image.MAX_IMAGE_PIXELS`, about 179 million).
    """
    if not data:
        raise UnreadableImage("0 bytes")
    try:
        image = Image.open(io.BytesIO(data))
        if image.format in ("JPEG", "MPO"):
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return decode_jpeg(encoded, ImageReadMode.RGB, apply_exif_orientation=True)  # (3, H, W)
        image = _to_rgb(ImageOps.exif_transpose(image))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (H, W, 3) in memory → (3, H, W)
    except UnidentifiedImageError:
        raise UnreadableImage("not an image") from None
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"decompression bomb: {error}") from None
    except RuntimeError as error:  # torchvision
        reason = "truncated JPEG" if "incomplete" in str(error) else f"broken JPEG: {str(error).splitlines()[0]}"
        raise UnreadableImage(reason) from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's decoders raise
        reason = "truncated" if "truncated" in str(error) else str(error)
        raise UnreadableImage(reason or type(error).__name__) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        if image.mode != "I" or pixels.max(initial=0) > 255:
            pixels = pixels >> 8
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")  # a palette with transparent entries has no direct way to RGB
    return image.convert("RGB")
