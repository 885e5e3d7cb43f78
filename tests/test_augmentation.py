"""Augmentation: torchvision's own transforms are the oracles for crops and policies."""

import math
from collections import Counter
from random import Random
from typing import Any

import pytest
import torch
from PIL import ImageFilter, ImageOps
from torchvision.transforms.v2 import InterpolationMode, RandAugment, RandomResizedCrop, TrivialAugmentWide
from torchvision.transforms.v2 import functional as F

from vit_finetune.data.augmentation import (
    BINS,
    OPERATIONS,
    Augmentation,
    draw_crop,
    generator_of,
    randaugment_space,
    trivialaugment_space,
)
from vit_finetune.recipe import AugmentationConfig

FILL = [10, 120, 230]
THEIR_NAMES = {name: name.title().replace("_", "") for name in OPERATIONS} | {"autocontrast": "AutoContrast"}


def picture(height: int = 30, width: int = 41, seed: int = 0) -> torch.Tensor:
    coarse = torch.randint(
        0, 256, (3, 6, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return F.resize(coarse, [height, width])


def augmentation(size: tuple[int, int] = (16, 24), **options: Any) -> Augmentation:
    config = AugmentationConfig(**{"horizontal_flip": 0, **options})
    return Augmentation(
        config, size, FILL, InterpolationMode.BILINEAR, lambda image: F.resize(image, list(size))
    )


def vary(augment: Augmentation, image: torch.Tensor, generator: Random) -> torch.Tensor:
    """An image, cropped and varied as in training."""
    return augment(augment.fit(image, augment.draw_crop(tuple(image.shape[-2:]), generator)), generator)


# --------------------------------------------------------------------------- crops


@pytest.mark.parametrize("size", [(300, 400), (90, 700), (8, 8)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 1.0), (1.0, 1.0)])
def test_crops_are_distributed_as_those_of_random_resized_crop(
    size: tuple[int, int], scale: tuple[float, float]
) -> None:
    count, ratio = 1000, (3 / 4, 4 / 3)
    transform, image = RandomResizedCrop(8, scale=scale, ratio=ratio), torch.empty(3, *size)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [transform.make_params([image]) for _ in range(count)]
    keys = ("top", "left", "height", "width")
    theirs = torch.tensor([[float(crop[key]) for key in keys] for crop in theirs])  # (count, 4)
    ours = torch.tensor([draw_crop(size, scale, ratio, Random(number)) for number in range(count)]).float()
    assert (ours[:, 0] + ours[:, 2]).max() <= size[0] and (ours[:, 1] + ours[:, 3]).max() <= size[1]
    assert ours[:, :2].min() >= 0 and ours[:, 2:].min() >= 1
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):  # the quantiles agree to 5% of the side, or a pixel
        difference = (ours.quantile(share, dim=0) - theirs.quantile(share, dim=0)).abs()
        assert (difference <= (0.05 * torch.tensor([*size, *size])).clamp(min=1)).all()


def test_wide_and_tall_crops_are_equally_likely() -> None:
    crops = [draw_crop((1000, 1000), (0.01, 0.02), (0.1, 10), Random(number)) for number in range(1000)]
    tall = sum(height > width for _, _, height, width in crops)
    assert 450 < tall < 550  # uniform in the ratio itself, it would be a tenth


def test_a_crop_that_cannot_fit_is_the_largest_central_one() -> None:
    assert draw_crop((10, 1000), (1.0, 1.0), (3 / 4, 4 / 3), Random(0)) == (0, 493, 10, 13)
    assert draw_crop((1000, 10), (1.0, 1.0), (3 / 4, 4 / 3), Random(0)) == (493, 0, 13, 10)


def test_the_crop_is_torchvisions_resized_crop() -> None:
    image, generator = picture(), generator_of(1, 2, 3)
    top, left, height, width = draw_crop((30, 41), (0.3, 0.6), (0.5, 2), generator_of(1, 2, 3))
    cropped = vary(augmentation(crop_scale=(0.3, 0.6), crop_ratio=(0.5, 2)), image, generator)
    assert torch.equal(cropped, F.resized_crop(image, top, left, height, width, [16, 24], antialias=True))


def test_without_a_crop_the_image_is_resized_as_in_evaluation() -> None:
    image = picture()
    assert torch.equal(vary(augmentation(crop_scale=None), image, Random(0)), F.resize(image, [16, 24]))


# --------------------------------------------------------------------------- policies


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("policy", ["trivialaugment", "randaugment"])
def test_operations_and_strengths_are_torchvisions(policy: str, name: str) -> None:
    image = picture(33, 47)
    oracle = TrivialAugmentWide(fill=FILL) if policy == "trivialaugment" else RandAugment(fill=FILL)
    space = trivialaugment_space() if policy == "trivialaugment" else randaugment_space((33, 47))
    strengths_of, signed = oracle._AUGMENTATION_SPACE[THEIR_NAMES[name]]
    theirs, (ours, our_signed) = strengths_of(BINS, 33, 47), space[name]
    assert our_signed == signed
    if theirs is None:
        assert len(ours) == 0
        theirs, ours = [0.0], [0.0]
    assert list(ours) == pytest.approx([float(strength) for strength in theirs], abs=1e-5)
    for bin_ in {0, 1, 9, 17, BINS - 1} & set(range(len(ours))):
        for sign in (1, -1) if signed else (1,):
            expected = oracle._apply_image_or_video_transform(
                image, THEIR_NAMES[name], sign * float(theirs[bin_]), oracle.interpolation, oracle._fill
            )
            operated = OPERATIONS[name](image, sign * float(theirs[bin_]), [float(value) for value in FILL])
            assert torch.equal(operated, expected), (bin_, sign)


def test_policies_have_all_of_torchvisions_operations() -> None:
    for oracle, space in (
        (TrivialAugmentWide, trivialaugment_space()),
        (RandAugment, randaugment_space((16, 16))),
    ):
        assert {THEIR_NAMES[name] for name in space} == set(oracle._AUGMENTATION_SPACE)


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Names and strengths of the operations applied since the start of the test."""
    applied: list[tuple[str, float]] = []
    for name in OPERATIONS:

        def record(image: torch.Tensor, strength: float, fill: list[float], name: str = name) -> torch.Tensor:
            applied.append((name, strength))
            return image

        monkeypatch.setitem(OPERATIONS, name, record)
    return applied


def test_trivialaugment_draws_one_operation_of_any_strength(operations: list[tuple[str, float]]) -> None:
    augment, image = augmentation(crop_scale=None, policy="trivialaugment"), picture(16, 24)
    for number in range(2800):
        vary(augment, image, generator_of(0, 0, number))
    assert len(operations) == 2800
    assert set(Counter(name for name, _ in operations)) == set(OPERATIONS)
    assert all(
        130 < count < 280 for count in Counter(name for name, _ in operations).values()
    )  # 200 expected
    rotations = [strength for name, strength in operations if name == "rotate"]
    assert 0.35 < sum(strength < 0 for strength in rotations) / len(rotations) < 0.65
    assert len({abs(strength) for strength in rotations}) == BINS


def test_randaugment_draws_operations_of_one_strength(operations: list[tuple[str, float]]) -> None:
    options = {"policy": "randaugment", "randaugment_num_ops": 3, "randaugment_magnitude": 12}
    augment, image = augmentation(crop_scale=None, **options), picture(16, 24)
    for number in range(300):
        vary(augment, image, generator_of(0, 0, number))
    assert len(operations) == 900
    expected = {
        name: strengths[12] for name, (strengths, _) in randaugment_space((16, 24)).items() if len(strengths)
    }
    found = {name: {abs(strength) for given, strength in operations if given == name} for name in expected}
    assert found == {name: {strength} for name, strength in expected.items()}


def test_threeaugment_is_what_the_paper_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against Pillow's operations, as DeiT's own code has them; each as often, and the jitter as wide, as it says."""
    jitters: list[list[tuple[str, float]]] = []
    for name in ("brightness", "contrast", "saturation"):

        def record(image: torch.Tensor, factor: float, name: str = name) -> torch.Tensor:
            jitters[-1].append((name, factor))
            return image

        monkeypatch.setattr(F, f"adjust_{name}", record)
    image = picture(48, 64)
    pil = F.to_pil_image(image)
    grey = F.pil_to_tensor(pil.convert("L").convert("RGB"))
    solarized = F.pil_to_tensor(ImageOps.solarize(pil))
    kinds: Counter[str] = Counter()
    for number in range(900):
        jitters.append([])
        varied = vary(
            augmentation((48, 64), crop_scale=None, policy="threeaugment"), image, generator_of(0, 0, number)
        )
        if torch.equal(varied, solarized):
            kinds["solarized"] += 1
        elif (varied.int() - grey.int()).abs().max() <= 1:
            kinds["grey"] += 1
        else:
            kinds["blurred"] += 1
            draws = generator_of(0, 0, number)
            draws.random(), draws.randrange(3)
            blurred = F.pil_to_tensor(pil.filter(ImageFilter.GaussianBlur(draws.uniform(0.1, 2.0))))
            # Pillow's is made of box blurs, and at the border it repeats pixels where torchvision mirrors.
            assert (varied.int() - blurred.int())[:, 7:-7, 7:-7].abs().float().mean() < 1.5
    assert all(250 < kinds[name] < 350 for name in ("solarized", "grey", "blurred"))
    orders = Counter(tuple(name for name, _ in jitter) for jitter in jitters)
    assert len(orders) == 6 and min(orders.values()) > 100
    factors = torch.tensor([factor for jitter in jitters for _, factor in jitter])
    assert 0.7 <= factors.min() < 0.71 and 1.29 < factors.max() <= 1.3 and abs(factors.mean() - 1) < 0.02


# --------------------------------------------------------------------------- flips, erasing, randomness


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_share_of_flipped_images(share: float) -> None:
    image = picture(16, 24)
    augment = augmentation(crop_scale=None, horizontal_flip=share)
    results = [vary(augment, image, generator_of(0, 0, number)) for number in range(600)]
    flipped = sum(torch.equal(result, image.flip(-1)) for result in results)
    assert sum(torch.equal(result, image) for result in results) == 600 - flipped
    assert abs(flipped / 600 - share) <= (0.06 if 0 < share < 1 else 0)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_erasing_paints_one_rectangle_in_the_mean_colour(share: float) -> None:
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    augment = augmentation((40, 60), crop_scale=None, random_erasing=share)
    areas = []
    for number in range(400):
        erased = vary(augment, image, generator_of(0, 0, number)) != 0  # (3, 40, 60)
        if erased.any():
            rows, columns = erased[0].any(dim=1).nonzero(), erased[0].any(dim=0).nonzero()
            area = len(rows) * len(columns)
            assert erased[0].sum() == area and rows[-1] - rows[0] + 1 == len(rows)
            areas.append(area / 2400)
            result = vary(augment, image, generator_of(0, 0, number))
            assert result[:, rows[0], columns[0]].flatten().tolist() == FILL
    assert abs(len(areas) / 400 - share) <= (0.07 if 0 < share < 1 else 0)
    assert all(0.01 < area < 0.4 for area in areas)
    assert image.sum() == 0  # the given image is left as it was


def test_an_image_is_varied_by_seed_epoch_and_index_alone() -> None:
    augment = augmentation(horizontal_flip=0.5, policy="trivialaugment", random_erasing=0.5)
    keys = [(seed, epoch, index) for seed in (0, 1) for epoch in (0, 1, 11) for index in (0, 1, 11)]
    once = {key: vary(augment, picture(), generator_of(*key)) for key in keys}
    torch.manual_seed(99)  # torch's own generator has no say
    again = {key: vary(augment, picture(), generator_of(*key)) for key in reversed(keys)}
    assert all(torch.equal(once[key], again[key]) for key in keys)
    assert len({image.numpy().tobytes() for image in once.values()}) > len(keys) * 0.8
    assert all(image.shape == (3, 16, 24) and image.dtype == torch.uint8 for image in once.values())


def test_tiny_and_narrow_images_are_augmented() -> None:
    augment = augmentation(horizontal_flip=0.5, policy="randaugment", random_erasing=1.0)
    for size in [(1, 1), (1, 300), (300, 1)]:
        image = torch.full((3, *size), 128, dtype=torch.uint8)
        assert vary(augment, image, Random(0)).shape == (3, 16, 24)
    assert math.prod(draw_crop((1, 1), (0.02, 1 / 3), (0.3, 3.3), Random(0))[2:]) == 1
