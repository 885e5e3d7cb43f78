"""Images that must not be carved apart, and the order in which they are chosen: by hash, not by row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from vit_finetune.data.sources.columns import column_array
from vit_finetune.data.sources.labels import strata

Integers = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Units:
    """What is carved as one: an image, or images of one group, of the same content, or known to be twins."""

    of_image: Integers
    """The unit of each image, `(num_images,)`."""
    sizes: Integers
    """Images of each unit, `(num_units,)`."""
    labels: Integers
    """The class (`strata`) that most images of each unit have, `(num_units,)`; of equally many the first."""
    keys: Hashes
    """Where each unit stands in the order of choosing, `(num_units,)`."""


def hash_keys(seed: int, keys: Iterable[str]) -> Hashes:
    """One number per text, as random as can be, by the seed and the text alone: uint64 `(num_keys,)`."""
    digests = (blake2b(f"{seed}\0{key}".encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def find_units(images: datasets.Dataset, seed: int, twins: Iterable[tuple[str, str]] = ()) -> Units:
    """The connected components of images that share a group or their content, or are twins.

    A unit's key is the smallest hash of its images' groups, or ids where they have none: so it stays where it
    is when other images come or go.

    Args:
        images: columns id and label; where there are columns group and digest (content hash) they tie images.
        seed: of the order of choosing.
        twins: pairs of ids that belong together; those of other images are passed over.
    """
    ids = column_array(images, "id")
    labels, _ = strata(images)
    keys = hash_keys(seed, ids.to_pylist())
    codes = []
    if "group" in images.column_names:
        # A group's name is told from an id of the same text.
        groups, names = _encode(column_array(images, "group"))
        of_names = hash_keys(seed, (f"group {name}" for name in names))
        keys = np.where(groups >= 0, of_names[groups], keys) if len(of_names) else keys
        codes.append(groups)
    if "digest" in images.column_names:
        codes.append(_encode(column_array(images, "digest"))[0])
    of_image = _connect(codes, _find_pairs(ids, twins), len(images))
    if of_image is None:
        everyone = np.arange(len(images))
        return Units(everyone, np.ones_like(everyone), labels, keys)
    sizes = np.bincount(of_image)
    smallest = np.full(len(sizes), np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(smallest, of_image, keys)
    return Units(of_image, sizes, _majorities(of_image, labels), smallest)


def _encode(column: pa.ChunkedArray) -> tuple[Integers, list[str]]:
    """Equal texts by equal numbers, -1 for none, `(num_rows,)`; and the texts by number."""
    encoded = pc.if_else(pc.equal(column, ""), None, column).combine_chunks().dictionary_encode()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return codes.astype(np.int64), encoded.dictionary.to_pylist()


def _find_pairs(ids: pa.ChunkedArray, twins: Iterable[tuple[str, str]]) -> Integers:
    """Row numbers of the twins that are both there, `(num_pairs, 2)`."""
    wanted = pa.array([identity for pair in twins for identity in pair], pa.string())
    rows = pc.index_in(wanted, value_set=ids.combine_chunks()).fill_null(-1)
    pairs = rows.to_numpy(zero_copy_only=False).astype(np.int64).reshape(-1, 2)
    known: Integers = pairs[(pairs >= 0).all(axis=1)]
    return known


def _connect(codes: Sequence[Integers], pairs: Integers, size: int) -> Integers | None:
    """The component of each image, `(size,)`; None where nothing ties any two.

    Images are the nodes 0 to size - 1; every value that at least two images share is a further node.
    """
    heads, tails, nodes = [pairs[:, 0]], [pairs[:, 1]], size
    for values in codes:
        counts = np.bincount(values[values >= 0]) if (values >= 0).any() else np.zeros(0, np.int64)
        rows = np.flatnonzero((values >= 0) & (counts[values] > 1)) if len(counts) else np.zeros(0, np.int64)
        heads.append(rows)
        tails.append(nodes + values[rows])
        nodes += len(counts)
    head, tail = np.concatenate(heads), np.concatenate(tails)
    if not len(head):
        return None
    graph = coo_array((np.ones(len(head), np.int8), (head, tail)), shape=(nodes, nodes))
    _, components = connected_components(graph, directed=False)
    # Values that nobody shares are nodes without an image: count the images' components only.
    _, of_image = np.unique(components[:size], return_inverse=True)
    components_of: Integers = of_image.astype(np.int64)
    return components_of


def _majorities(of_image: Integers, labels: Integers) -> Integers:
    """The most frequent class of each unit, `(num_units,)`; of equally frequent ones the first."""
    classes = int(labels.max()) + 1
    pairs, counts = np.unique(of_image * classes + labels, return_counts=True)
    units, of_pair = np.divmod(pairs, classes)
    order = np.lexsort((of_pair, -counts, units))  # by unit, the most frequent class first
    _, first = np.unique(units[order], return_index=True)
    majorities: Integers = of_pair[order][first]
    return majorities
