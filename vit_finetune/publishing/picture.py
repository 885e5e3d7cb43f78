"""Pictures that stand inside a page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError


@dataclass(frozen=True)
class Picture:
    """A picture to stand inside a page."""

    uri: str
    """`data:image/…;base64,…`"""
    width: int
    height: int
    """Pixels."""

    @property
    def is_tiny(self) -> bool:
        """Whether enlarging should show its pixels rather than blur them."""
        return max(self.width, self.height) <= 64


def build_picture(content: bytes) -> Picture | None:
    """The picture in a file's bytes; None where they are none that a browser could show."""
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP", "GIF")) as image:
            kind, (width, height) = image.get_format_mimetype(), image.size
    except (OSError, UnidentifiedImageError):
        return None
    return Picture(f"data:{kind};base64,{base64.b64encode(content).decode()}", width, height)
