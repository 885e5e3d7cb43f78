"""Which images are the same, by content; which nearly so, by perceptual hash and then by pixels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from vit_finetune.data.checkup.readings import hash_text, shrink
from vit_finetune.files import written_whole

DISTANCE = 10
"""Bits of 64 in which the hashes of near duplicates may differ: what another size, stronger compression,
another brightness or a narrow cut at the edge change in photographs."""

SIMILARITY = 0.95
"""Correlation from which on two thumbnails show the same picture. Of the pairs of CIFAR-10 whose hashes are
close, nearly all above it are the same photograph or drawing, and more and more below it only look alike."""

_SIDE = 16
"""Pixels; a thumbnail this small forgives a shift of a pixel or two, and a watermark."""

_PIECES, _INTACT = 13, 3

_CROWD = 200
"""Files with one hash, above which each is compared with the first only: nearly empty pictures, or a film."""


ALIKE = 10
"""Pairs of close hashes for each image, on average, above which pictures are alike by nature, so that hashes
do not tell which are the same. CIFAR-10 has 0.1; handwritten digits, 6 among 2,000 and 58 among 20,000."""


def group_equal(digests: pa.Array) -> list[np.ndarray]:
    """Rows of equal content, group by group, each ascending; rows that stand alone are left out.

    Args:
        digests: content hashes, strings; rows with an empty one equal nothing.
    """
    coded = digests.dictionary_encode()
    nothing = coded.dictionary.index("").as_py()  # -1 where there is none
    group = coded.indices.to_numpy()
    return _groups(np.where(group == nothing, -1, group))


def group_linked(pairs: np.ndarray, count: int) -> list[np.ndarray]:
    """Rows that hang together through pairs, group by group, each ascending.

    Args:
        pairs: row numbers `(n, 2)`.
        count: how many rows there are.
    """
    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return _groups(connected_components(graph, directed=False)[1])


def _groups(group: np.ndarray) -> list[np.ndarray]:
    """The rows of each group number that two rows or more have; -1 is no group."""
    rows = np.flatnonzero(group >= 0)
    rows = rows[np.bincount(group[rows])[group[rows]] > 1]  # few: most images stand alone
    rows = rows[np.argsort(group[rows], kind="stable")]
    return np.split(rows, np.flatnonzero(np.diff(group[rows])) + 1) if len(rows) else []


def close_pairs(hashes: np.ndarray, distance: int = DISTANCE, most: float = math.inf) -> np.ndarray:
    """All pairs of rows `(n, 2)`, lower first, whose hashes differ in at most `distance` bits.

    Where there are more than `most`, only so many that this can be seen.

    Cut into 13 pieces, two hashes that differ in at most 10 bits agree in at least 3 pieces (pigeonhole). So
    only rows that agree in the same 3 pieces are compared, for each of the 286 choices of 3.

    Args:
        hashes: uint64 `(n,)`.
        distance: at most 10.
        most: pairs.
    """
    assert distance <= _PIECES - _INTACT
    edges = np.linspace(0, 64, _PIECES + 1).astype(int)
    pieces = [
        (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        for low, high in itertools.pairwise(edges)
    ]
    size = max(len(hashes), 1)
    found = np.empty(0, np.int64)  # lower row × size + higher row
    fresh: list[np.ndarray] = []
    waiting = 0
    for one, two, three in itertools.combinations(pieces, _INTACT):
        # At most 5 bits each; numpy sorts 16-bit numbers by radix.
        key = (one << np.uint64(10) | two << np.uint64(5) | three).astype(np.uint16)
        order = np.argsort(key, kind="stable")
        key, value = key[order], hashes[order]
        # Each row is compared with the one behind it, then with the one after that, while the keys agree.
        rows = np.arange(len(order) - 1)
        for step in range(1, len(order)):
            rows = rows[: np.searchsorted(rows, len(order) - step)]
            rows = rows[key[rows] == key[rows + step]]
            if not len(rows):
                break
            near = rows[np.bitwise_count(value[rows] ^ value[rows + step]) <= distance]
            lower, higher = (
                np.minimum(order[near], order[near + step]),
                np.maximum(order[near], order[near + step]),
            )
            fresh.append(lower * size + higher)
            waiting += len(near)
            # Most pairs come again with other pieces; joined now and then, they do not fill the memory.
            if waiting > max(len(found), 1_000_000):
                found, fresh, waiting = np.unique(np.concatenate([found, *fresh])), [], 0
                if len(found) > most:
                    return np.stack(np.divmod(found, size), axis=1)
    return np.stack(np.divmod(np.unique(np.concatenate([found, *fresh])), size), axis=1)


def similarity(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How alike pairs of thumbnails are, float32 `(n,)`, 1 being the same but for brightness and contrast.

    The correlation over all pixels and channels once each channel's mean is taken off.

    Args:
        one: uint8 `(n, pixels, 3)`.
        other: the same.
    """
    flat = []
    for pictures in (one, other):
        values = pictures.astype(np.float32)
        centred = (values - values.mean(axis=1, keepdims=True)).reshape(len(pictures), -1)
        norm: np.ndarray = np.linalg.norm(centred, axis=1, keepdims=True)
        # Where nothing is to be seen, nothing is alike.
        flat.append(np.divide(centred, norm, out=np.zeros_like(centred), where=norm > 1))
    return np.asarray(np.einsum("np,np->n", *flat))


def build_thumbnail(pixels: torch.Tensor) -> np.ndarray:
    """An image's thumbnail, uint8 `(256, 3)`, for `similarity`.

    Args:
        pixels: uint8 `(3, height, width)`.
    """
    small = shrink(pixels).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return np.asarray(small).reshape(-1, 3)


def find_near(
    digests: Sequence[str],
    hashes: np.ndarray,
    open_image: Callable[[int], torch.Tensor],
    memory: Path,
) -> np.ndarray | None:
    """Pairs of rows `(n, 2)` that show the same picture, though they are different files.

    None where so many are alike that these cannot be told.

    Args:
        digests: content hashes, each once: rows of equal content are not near duplicates.
        hashes: perceptual hashes, uint64.
        open_image: a row's pixels, uint8 `(3, height, width)`.
        memory: a Parquet file that remembers the answer for these digests.
    """
    key = hash_text("\n".join([f"{DISTANCE} {SIMILARITY} {ALIKE}", *digests]))
    remembered = _remembered(memory, key)
    if remembered is not None:
        return remembered
    pairs = _candidates(hashes)
    if pairs is None:
        return None
    rows, place = np.unique(pairs, return_inverse=True)
    place = place.reshape(pairs.shape)
    thumbnails = np.empty((len(rows), _SIDE * _SIDE, 3), np.uint8)
    for number, row in enumerate(rows.tolist()):
        thumbnails[number] = build_thumbnail(open_image(row))
    alike = np.zeros(len(pairs), np.float32)
    for start in range(0, len(pairs), 4096):  # few at a time, because in floating point they are large
        one, other = place[start : start + 4096].T
        alike[start : start + 4096] = similarity(thumbnails[one], thumbnails[other])
    pairs = pairs[alike >= SIMILARITY]
    table = pa.table({"one": pairs[:, 0], "other": pairs[:, 1]}).replace_schema_metadata({"key": key})
    # A memory that cannot be written only costs the time to look again.
    with suppress(OSError), written_whole(memory) as temporary:
        pa.parquet.write_table(table, temporary)
    return pairs


def _candidates(hashes: np.ndarray) -> np.ndarray | None:
    """Pairs whose hashes are close; of a crowd with one hash, pairs with its first member.

    None where all are alike.
    """
    _, first, member, size = np.unique(hashes, return_index=True, return_inverse=True, return_counts=True)
    rows = np.arange(len(hashes))
    crowded = (size[member] > _CROWD) & (first[member] != rows)
    rest = rows[~crowded]
    with_first = np.stack([first[member[crowded]], rows[crowded]], axis=1)
    pairs = close_pairs(hashes[rest], most=ALIKE * len(rest))
    return None if len(pairs) > ALIKE * len(rest) else np.concatenate([rest[pairs], with_first])


def _remembered(memory: Path, key: str) -> np.ndarray | None:
    with suppress(OSError, pa.ArrowException):
        table = pa.parquet.read_table(memory)
        if (table.schema.metadata or {}).get(b"key") == key.encode():
            return np.stack([table["one"].to_numpy(), table["other"].to_numpy()], axis=1)
    return None
