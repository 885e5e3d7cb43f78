"""Augmentation: one training image in, a varied one out, decided by (seed, epoch, image index) alone.

Every random draw comes from a generator made for the one image, never from torch's global one: so the result
cannot depend on workers, processes, resuming or batch size, and costs 7 µs where reseeding torch costs more
than the crop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from typing import NamedTuple

import torch
from torchvision.transforms.v2 import functional as F
from torchvision.transforms.v2.functional import InterpolationMode

from vit_finetune.recipe import AugmentationConfig

BINS = 31
"""Strengths of a policy's operations, as in both papers and in torchvision."""


def generator_of(seed: int, epoch: int, key: int | str) -> Random:
    """The random numbers that belong to one image in one epoch.

    Args:
        seed: of all augmentation.
        epoch: counted from 0.
        key: what the image is known by: its row, or where rows are streamed the hash of its content.
    """
    return Random(f"{seed}/{epoch}/{key}")


class Crop(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def shrink_for(self, size: tuple[int, int]) -> int:
        """By how much (1, 2, 4 or 8) a decoder may divide the sides and still leave `size` pixels here.

        Args:
            size: height and width that the crop will be resized to.
        """
        spare = min(self.height / size[0], self.width / size[1])
        return next((factor for factor in (8, 4, 2) if spare >= factor), 1)

    def on(self, size: Sequence[int], original: Sequence[int]) -> Crop:
        """The same part of a smaller picture of the image, to the nearest pixel.

        Args:
            size: the picture's height and width.
            original: the image's height and width, of which this is a part.
        """
        if tuple(size) == tuple(original):
            return self
        down, across = size[0] / original[0], size[1] / original[1]
        height, width = max(1, round(self.height * down)), max(1, round(self.width * across))
        top = min(round(self.top * down), size[0] - height)
        return Crop(top, min(round(self.left * across), size[1] - width), height, width)


class Augmentation:
    """Random resized crop, flip, policy and erasing, in this order, on uint8 images.

    Args:
        config: the recipe's section.
        size: height and width of the result in pixels.
        fill: the mean colour as 3 values from 0 to 255; what shearing, rotating and erasing leave behind.
        interpolation: of the crop; the evaluation's, so that both see the same kind of pixels.
        resize: what to do instead of a random crop: evaluation's resizing.
    """

    def __init__(
        self,
        config: AugmentationConfig,
        size: tuple[int, int],
        fill: Sequence[int],
        interpolation: InterpolationMode,
        resize: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self.config, self.size, self.fill, self.interpolation, self.resize = (
            config,
            size,
            fill,
            interpolation,
            resize,
        )

    def draw_crop(self, size: tuple[int, int], generator: Random) -> Crop | None:
        """The part of an image to train on; None where the recipe wants no random crop.

        Apart from the rest, so that a decoder can be told how many pixels are needed.

        Args:
            size: the original's height and width in pixels.
            generator: the image's own; the crop is what it draws first.
        """
        if self.config.crop_scale is None:
            return None
        return draw_crop(size, self.config.crop_scale, self.config.crop_ratio, generator)

    def fit(self, image: torch.Tensor, crop: Crop | None) -> torch.Tensor:
        """The part of an image, or all of it as evaluation sees it: uint8 `(3, …)` → uint8 `(3, *size)`.

        Args:
            image: uint8 `(3, height, width)` of any size.
            crop: in the pixels of `image`.
        """
        if crop is None:
            return self.resize(image)
        fitted: torch.Tensor = F.resized_crop(
            image, *crop, list(self.size), interpolation=self.interpolation, antialias=True
        )
        return fitted

    def __call__(self, image: torch.Tensor, generator: Random) -> torch.Tensor:
        """A fitted image, varied: uint8 `(3, *size)` → uint8 `(3, *size)`."""
        config = self.config
        if generator.random() < config.horizontal_flip:
            image = F.horizontal_flip(image)
        match config.policy:
            case "trivialaugment":
                image = self._operate(image, trivialaugment_space(), generator.randrange(BINS), generator)
            case "randaugment":
                for _ in range(config.randaugment_num_ops):
                    space = randaugment_space(self.size)
                    image = self._operate(image, space, config.randaugment_magnitude, generator)
            case "threeaugment":
                image = threeaugment(image, generator)
        if generator.random() < config.random_erasing:
            part = draw_crop(self.size, (0.02, 1 / 3), (0.3, 3.3), generator)
            colour = torch.tensor(self.fill, dtype=torch.uint8).reshape(3, 1, 1)
            image = F.erase(image, *part, colour.expand(3, part.height, part.width))
        return image

    def _operate(
        self,
        image: torch.Tensor,
        space: dict[str, tuple[Sequence[float], bool]],
        bin_: int,
        generator: Random,
    ) -> torch.Tensor:
        name = generator.choice(list(space))
        strengths, signed = space[name]
        strength = strengths[bin_] if len(strengths) else 0.0
        if signed and generator.random() < 0.5:
            strength = -strength
        return OPERATIONS[name](image, strength, [float(value) for value in self.fill])


def draw_crop(
    size: Sequence[int], scale: tuple[float, float], ratio: tuple[float, float], generator: Random
) -> Crop:
    """A random part of an image.

    Ten tries at an area share uniform in `scale` and an aspect ratio log-uniform in `ratio`, then the largest
    central part that keeps the ratio: the algorithm of `torchvision.transforms.v2.RandomResizedCrop`.

    Args:
        size: the image's height and width in pixels.
        scale: smallest and largest share of the area.
        ratio: smallest and largest width by height.
        generator: the image's own.
    """
    height, width = size
    for _ in range(10):
        area = height * width * generator.uniform(*scale)
        aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Crop(generator.randint(0, height - h), generator.randint(0, width - w), h, w)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return Crop((height - h) // 2, (width - w) // 2, max(h, 1), max(w, 1))


def threeaugment(image: torch.Tensor, generator: Random) -> torch.Tensor:
    """An image varied by 3-Augment (Touvron et al., 2022, DeiT III, section 3): uint8 `(3, height, width)`.

    One of greyscale, solarised from 128 on, or blurred with σ uniform in [0.1, 2] pixels; then brightness,
    contrast and saturation, in any order, each by a factor uniform in [0.7, 1.3].

    Args:
        image: uint8 `(3, height, width)`, of at least 7 pixels a side.
        generator: the image's own.
    """
    match generator.randrange(3):
        case 0:
            image = F.rgb_to_grayscale(image, num_output_channels=3)
        case 1:
            image = F.solarize(image, 128)
        case _:
            sigma = generator.uniform(0.1, 2.0)
            image = F.gaussian_blur(image, [2 * math.ceil(3 * sigma) + 1] * 2, [sigma, sigma])
    jitter = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation]
    generator.shuffle(jitter)
    for adjust in jitter:
        image = adjust(image, generator.uniform(0.7, 1.3))
    return image


# --------------------------------------------------------------------------- operations of the policies


def _spread(low: float, high: float) -> list[float]:
    return [low + (high - low) * bin_ / (BINS - 1) for bin_ in range(BINS)]


def _posterize_bits(per_bit: float) -> list[float]:
    return [8 - round(bin_ / per_bit) for bin_ in range(BINS)]


def trivialaugment_space() -> dict[str, tuple[Sequence[float], bool]]:
    """Strengths by operation, and whether each is also used negated (Müller and Hutter, 2021, "wide")."""
    return {
        "identity": ((), False),
        "shear_x": (_spread(0, 0.99), True),
        "shear_y": (_spread(0, 0.99), True),
        "translate_x": (_spread(0, 32), True),
        "translate_y": (_spread(0, 32), True),
        "rotate": (_spread(0, 135), True),
        "brightness": (_spread(0, 0.99), True),
        "color": (_spread(0, 0.99), True),
        "contrast": (_spread(0, 0.99), True),
        "sharpness": (_spread(0, 0.99), True),
        "posterize": (_posterize_bits((BINS - 1) / 6), False),
        "solarize": (_spread(1, 0), False),
        "autocontrast": ((), False),
        "equalize": ((), False),
    }


def randaugment_space(size: tuple[int, int]) -> dict[str, tuple[Sequence[float], bool]]:
    """Strengths by operation, and whether each is also used negated (Cubuk et al., 2019).

    The ranges are torchvision's.

    Args:
        size: the image's height and width in pixels; translations are shares of it.
    """
    height, width = size
    return trivialaugment_space() | {
        "shear_x": (_spread(0, 0.3), True),
        "shear_y": (_spread(0, 0.3), True),
        "translate_x": (_spread(0, 150 / 331 * width), True),
        "translate_y": (_spread(0, 150 / 331 * height), True),
        "rotate": (_spread(0, 30), True),
        "brightness": (_spread(0, 0.9), True),
        "color": (_spread(0, 0.9), True),
        "contrast": (_spread(0, 0.9), True),
        "sharpness": (_spread(0, 0.9), True),
        "posterize": (_posterize_bits((BINS - 1) / 4), False),
    }


Operation = Callable[[torch.Tensor, float, list[float]], torch.Tensor]


def _shear(image: torch.Tensor, strength: float, fill: list[float], axis: int) -> torch.Tensor:
    angles = [0.0, 0.0]
    angles[axis] = math.degrees(math.atan(strength))
    sheared: torch.Tensor = F.affine(
        image, angle=0.0, translate=[0, 0], scale=1.0, shear=angles, fill=fill, center=[0, 0],
        interpolation=InterpolationMode.NEAREST,
    )  # fmt: skip
    return sheared


def _translate(image: torch.Tensor, strength: float, fill: list[float], axis: int) -> torch.Tensor:
    offset = [0, 0]
    offset[axis] = int(strength)
    moved: torch.Tensor = F.affine(
        image, angle=0.0, translate=offset, scale=1.0, shear=[0.0, 0.0], fill=fill,
        interpolation=InterpolationMode.NEAREST,
    )  # fmt: skip
    return moved


OPERATIONS: dict[str, Operation] = {
    "identity": lambda image, strength, fill: image,
    "shear_x": partial(_shear, axis=0),
    "shear_y": partial(_shear, axis=1),
    "translate_x": partial(_translate, axis=0),
    "translate_y": partial(_translate, axis=1),
    "rotate": lambda image, strength, fill: F.rotate(image, strength, fill=fill),
    "brightness": lambda image, strength, fill: F.adjust_brightness(image, 1 + strength),
    "color": lambda image, strength, fill: F.adjust_saturation(image, 1 + strength),
    "contrast": lambda image, strength, fill: F.adjust_contrast(image, 1 + strength),
    "sharpness": lambda image, strength, fill: F.adjust_sharpness(image, 1 + strength),
    "posterize": lambda image, strength, fill: F.posterize(image, int(strength)),
    "solarize": lambda image, strength, fill: F.solarize(image, 255 * strength),
    "autocontrast": lambda image, strength, fill: F.autocontrast(image),
    "equalize": lambda image, strength, fill: F.equalize(image),
}
"""Image, strength and fill colour → image, by the operation's name."""
