"""The same image, byte for byte, in two splits: said, and left out of the lower one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vit_finetune.data.sources.columns import column_array, column_values
from vit_finetune.data.sources.folders import count_of, first_of
from vit_finetune.run import RunError


def drop_leaks(
    splits: Mapping[str, datasets.Dataset],
) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """The splits that a source has, without images whose content a split above also holds; and notices.

    Test is above validation, and that above train.

    Args:
        splits: by train, validation and test; what has no column digest (content hash) is left as it is.

    Raises:
        RunError: nothing is left of a split.
    """
    gone = {split: np.zeros(len(dataset), dtype=bool) for split, dataset in splits.items()}
    above: dict[str, list[str]] = {split: [] for split in splits}
    for lower, upper, leaked in find_leaks(splits):
        gone[lower] |= leaked
        above[lower].append(upper)
    for split, rows in gone.items():
        if len(rows) and rows.all():
            raise RunError(
                f"each of the {count_of(len(rows), 'image')} of {split} is also in "
                f"{' or '.join(above[split])}, such as {first_of(column_values(splits[split], 'id'))}; "
                f"expected different images in each split"
            )
    kept = {
        split: dataset.select(np.flatnonzero(~gone[split])) if gone[split].any() else dataset
        for split, dataset in splits.items()
    }
    return kept, describe_leaks(splits, "left out,")


def describe_leaks(splits: Mapping[str, datasets.Dataset], what: str) -> list[str]:
    """A sentence for each two splits that share images; `what` is done about those of the lower one."""
    notices = []
    for lower, upper, leaked in find_leaks(splits):
        ids = column_array(splits[lower], "id").filter(pa.array(leaked)).to_pylist()
        notices.append(
            f"{count_of(len(ids), 'image')} of {lower} {what} the same as images of {upper}: {first_of(ids)}"
        )
    return notices


def find_leaks(
    splits: Mapping[str, datasets.Dataset],
) -> Iterator[tuple[str, str, npt.NDArray[np.bool_]]]:
    """A split, one above it, and which images of the first the second has, `(num_images,)`; each once.

    Args:
        splits: by train, validation and test; what has no column digest (content hash) shares nothing.
    """
    digests = {
        split: column_array(splits[split], "digest").combine_chunks()
        for split in ("test", "validation", "train")
        if split in splits and "digest" in splits[split].column_names
    }
    known = list(digests)
    for number, lower in enumerate(known):
        seen = np.zeros(len(splits[lower]), dtype=bool)
        for upper in known[:number]:
            leaked = pc.is_in(digests[lower], digests[upper], skip_nulls=True).to_numpy(zero_copy_only=False)
            leaked = leaked & ~seen
            seen |= leaked
            if leaked.any():
                yield lower, upper, leaked
