"""Classes with unequal numbers of images: how much each weighs in the loss, and what is said of it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import numpy as np

from vit_finetune.run import RunError
from vit_finetune.training.hardware import Choice

SHOWN = 12
"""Classes up to which each is named; of more, the smallest and the largest."""


def count_classes(labels: Sequence[int], classes: int) -> list[int]:
    """Images of each class, in id order.

    Args:
        labels: class id of each image.
        classes: their number.
    """
    return [int(count) for count in np.bincount(labels, minlength=classes)]


def weigh_classes(
    asked: str | Mapping[str, float] | None, names: Sequence[str], counts: Sequence[int] | None
) -> list[float] | None:
    """The weight of each class in the training loss, in id order; None where all weigh the same.

    Args:
        asked: the recipe's `training.class_weights`.
        names: of the classes, in id order.
        counts: training images of each; None where they are streamed.

    Raises:
        RunError: a weight of a class that is not there, or `auto` without counts.
    """
    if asked is None:
        return None
    if isinstance(asked, Mapping):
        for name in asked:
            if name not in names:
                raise RunError(f"training.class_weights: {_unknown(name, names)}")
        return [float(asked.get(name, 1.0)) for name in names]
    if counts is None:
        raise RunError(
            "training.class_weights=auto counts the training images, which a stream does not hold: write the "
            "weights by name"
        )
    # scikit-learn's `balanced`, over the classes that there are; what a class without images has, only
    # smoothing could show.
    present = sum(count > 0 for count in counts)
    return [sum(counts) / (present * count) if count else 1.0 for count in counts]


def _unknown(name: str, names: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    shown = ", ".join(names[:SHOWN]) + (" …" if len(names) > SHOWN else "")
    hint = f"did you mean {nearest[0]}?" if nearest else f"the classes are {shown}"
    return f"there is no class {name}; {hint}"


def describe_classes(
    asked: str | Mapping[str, float] | None,
    balanced: bool,
    names: Sequence[str],
    labels: Sequence[int] | None,
) -> list[Choice]:
    """What a run says of its weights and of its sampling; nothing where the recipe asks for neither.

    Args:
        asked: the recipe's `training.class_weights`.
        balanced: the recipe's `data.balanced_sampling`.
        names: of the classes, in id order.
        labels: class id of each training image; None where they are streamed.

    Raises:
        RunError: as `weigh_classes`.
    """
    counts = None if labels is None else count_classes(labels, len(names))
    weights, choices = weigh_classes(asked, names, counts), []
    if weights is not None:
        formula = "training images / (classes × images of the class)"
        reasons = [formula if asked == "auto" else "the recipe says so"]
        reasons += [f"training images: {_list(names, counts)}"] if counts else []
        choices.append(Choice("class weights", _list(names, weights), "; ".join(reasons)))
    if balanced and counts:
        share, rest = divmod(sum(counts), sum(count > 0 for count in counts))
        each = f"{share:,} or {share + 1:,}" if rest else f"{share:,}"
        reason = (
            f"the recipe says so: of an epoch's {sum(counts):,} images {each} are of each class; training "
            f"images: {_list(names, counts)}"
        )
        choices.append(Choice("sampling", "balanced", reason))
    return choices


def _list(names: Sequence[str], values: Sequence[float]) -> str:
    """Each class with its value, or of many classes the smallest and the largest."""
    shown = [
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.3g}"
        for name, value in zip(names, values)
    ]
    if len(shown) <= SHOWN:
        return ", ".join(shown)
    low, high = (shown[values.index(value)] for value in (min(values), max(values)))
    return f"from {low} to {high}"
