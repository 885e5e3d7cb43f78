"""Equal and nearly equal images: brute force over all pairs is the oracle."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from drawn_corpus import draw_scene
from PIL import Image

from vit_finetune.data.checkup import duplicates
from vit_finetune.data.checkup.duplicates import (
    DISTANCE,
    build_thumbnail,
    close_pairs,
    find_near,
    group_equal,
    group_linked,
    similarity,
)
from vit_finetune.data.splits.prepared import prepare_splits
from vit_finetune.recipe import DataConfig


def pixels(seed: int, size: tuple[int, int] = (72, 56)) -> torch.Tensor:
    return torch.from_numpy(np.array(draw_scene(seed, size))).permute(2, 0, 1)


def brute_force(hashes: np.ndarray, distance: int) -> list[list[int]]:
    return [
        [one, other]
        for one, other in itertools.combinations(range(len(hashes)), 2)
        if (int(hashes[one]) ^ int(hashes[other])).bit_count() <= distance
    ]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("distance", [0, 3, DISTANCE])
def test_close_pairs_are_those_of_brute_force(seed: int, distance: int) -> None:
    """Clusters around a few centres, so that all distances from 0 to beyond the limit occur, anywhere in 64 bits."""
    generator = np.random.default_rng(seed)
    centres = generator.integers(0, 2**64, 8, dtype=np.uint64)
    hashes = []
    for _ in range(300):
        value = int(centres[generator.integers(8)])
        for bit in generator.choice(64, generator.integers(0, 11), replace=False):
            value ^= 1 << int(bit)
        hashes.append(value)
    found = close_pairs(np.array(hashes, np.uint64), distance)
    assert found.tolist() == brute_force(np.array(hashes, np.uint64), distance)


def test_no_pair_within_the_distance_is_missed_wherever_its_bits_lie() -> None:
    """The adversary puts the differing bits where they spoil most pieces."""
    edges = np.linspace(0, 64, duplicates._PIECES + 1).astype(int)
    for spoilt in itertools.combinations(range(duplicates._PIECES), DISTANCE):
        other = sum(1 << int(edges[piece]) for piece in spoilt)
        assert close_pairs(np.array([0, other], np.uint64)).tolist() == [[0, 1]]


@pytest.mark.parametrize("hashes", [[], [5], [5, 5]])
def test_few_hashes(hashes: list[int]) -> None:
    assert close_pairs(np.array(hashes, np.uint64)).tolist() == brute_force(np.array(hashes, np.uint64), 0)


def test_groups_are_those_of_a_plain_search() -> None:
    generator = np.random.default_rng(0)
    digests = [str(value) if value else "" for value in generator.integers(0, 40, 100)]
    expected = [
        [row for row, digest in enumerate(digests) if digest == value]
        for value in sorted(set(digests))
        if value
    ]
    found = sorted(rows.tolist() for rows in group_equal(pa.array(digests)))
    assert found == sorted(rows for rows in expected if len(rows) > 1)
    pairs = generator.integers(0, 100, (50, 2))
    member = list(range(100))
    for one, other in pairs.tolist():
        member = [member[one] if value == member[other] else value for value in member]
    linked = [[row for row in range(100) if member[row] == value] for value in set(member)]
    assert sorted(rows.tolist() for rows in group_linked(pairs, 100)) == sorted(
        rows for rows in linked if len(rows) > 1
    )
    assert group_equal(pa.array([], pa.string())) == [] and group_linked(np.empty((0, 2), np.int64), 0) == []


def test_similarity_is_the_correlation_of_the_channels_about_their_means() -> None:
    one, other = build_thumbnail(pixels(1)), build_thumbnail(pixels(2))
    flat = [(picture - picture.mean(axis=0)).ravel() for picture in (one.astype(float), other.astype(float))]
    expected = flat[0] @ flat[1] / math.sqrt((flat[0] @ flat[0]) * (flat[1] @ flat[1]))
    assert similarity(one[None], other[None])[0] == pytest.approx(expected, abs=1e-5)
    assert similarity(one[None], one[None])[0] == pytest.approx(1, abs=1e-6)
    assert similarity(one[None], 255 - one[None])[0] == pytest.approx(-1, abs=1e-6)
    grey = np.full_like(one, 77)
    assert similarity(one[None], grey[None])[0] == 0 and similarity(grey[None], grey[None])[0] == 0


def near(scenes: list[torch.Tensor], hashes: list[int], memory: Path, **options: Any) -> list[list[int]]:
    digests = options.get("digests", [str(number) for number in range(len(scenes))])
    opened = options.get("opened", [])
    return find_near(
        digests,
        np.array(hashes, np.uint64),
        lambda row: (opened.append(row), scenes[row])[1],
        memory,
    ).tolist()


def test_close_hashes_of_different_pictures_are_no_near_duplicates(tmp_path: Path) -> None:
    scenes = [pixels(1), pixels(2), pixels(4, (144, 112)), pixels(3)]
    assert near(scenes, [7, 7, 7, 1 << 40], tmp_path / "memory") == []
    scenes[2] = torch.nn.functional.interpolate(scenes[0][None].float(), scale_factor=2)[0].to(torch.uint8)
    assert near(scenes, [7, 7, 7, 1 << 40], tmp_path / "other") == [[0, 2]]


def test_only_pictures_with_close_hashes_are_opened_and_the_answer_is_remembered(tmp_path: Path) -> None:
    scenes, opened = [pixels(1), pixels(2), pixels(1)], []
    hashes = [7, 2**63 - 1, 5]
    for _ in range(2):
        assert near(scenes, hashes, tmp_path / "memory", opened=opened) == [[0, 2]]
        assert opened == [0, 2]
    assert near(scenes, hashes, tmp_path / "memory", digests=["0", "1", "new"], opened=opened) == [[0, 2]]
    assert opened == [0, 2] * 2
    (tmp_path / "memory").write_bytes(b"damaged")
    assert near(scenes, hashes, tmp_path / "memory", opened=opened) == [[0, 2]]
    assert opened == [0, 2] * 3


def test_a_crowd_with_one_hash_is_compared_with_its_first_only(tmp_path: Path) -> None:
    scenes = [pixels(1)] * 5 + [pixels(2)] * 300
    assert len(duplicates._candidates(np.full(305, 9, np.uint64))) == 304
    assert near(scenes, [9] * 305, tmp_path / "memory") == [[0, row] for row in range(1, 5)]


def test_a_search_among_pictures_that_are_all_alike_ends_early() -> None:
    hashes = np.zeros(4_000, np.uint64) + np.arange(4_000, dtype=np.uint64) % np.uint64(2)
    started = time.perf_counter()
    assert len(close_pairs(hashes, most=40_000)) > 40_000  # of 8 million
    assert time.perf_counter() - started < 5


def test_pictures_that_are_alike_by_nature_are_neither_named_nor_kept_together(tmp_path: Path) -> None:
    scene = np.asarray(draw_scene(1)).astype(int)
    for number in range(40):
        folder = tmp_path / "photos" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        brighter = Image.fromarray(np.clip(scene + number, 0, 255).astype(np.uint8))
        brighter.save(folder / f"{number}.png")
    config = DataConfig(path=str(tmp_path / "photos"))
    for _ in range(2):
        data = prepare_splits(config)
        assert [(f.kind, f.severity) for f in data.findings.findings] == [("all-alike", "note")]
        assert {name: len(split) for name, split in data.splits.items()} == {
            "train": 32,
            "validation": 4,
            "test": 4,
        }
