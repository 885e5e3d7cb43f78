"""What `tune` searches: keys of a recipe and their values, checked before anything heavy is imported."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vit_finetune.recipe import Recipe, RecipeError, build_recipe, read_value

SECTIONS = ("augmentation", "model", "training")
"""Sections whose keys can be searched, beside the one of `data:` that leaves every split as it is."""
BALANCED = "data.balanced_sampling"
FIXED = {
    "training.output_dir": "it says where the result goes",
    "training.metric_for_best_model": "the trials are compared by it",
    "training.seed": "the luckiest of several seeds is no better than the others",
    "training.eval_strategy": "the trials are compared at their evaluations",
    "training.load_best_model_at_end": "the trials are compared at their evaluations",
}
"""Keys that are not searched, and why."""
LOG_FROM = 10
"""A range of floats whose ends are so many times apart is searched on a logarithmic scale."""


@dataclass(frozen=True)
class Dimension:
    """One key and what it may be: a range with both ends, or one of a few values."""

    key: str
    low: float = 0
    high: float = 0
    choices: tuple[Any, ...] = ()

    @property
    def is_integer(self) -> bool:
        """Whether the range is one of whole numbers: both ends were written as such."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def is_logarithmic(self) -> bool:
        """Whether the range is searched by orders of magnitude."""
        return not self.choices and not self.is_integer and 0 < self.low <= self.high / LOG_FROM

    @property
    def values(self) -> tuple[Any, ...]:
        """The values to check: the ends of a range, or every choice."""
        return self.choices or (self.low, self.high)

    def __str__(self) -> str:
        if self.choices:
            return f"{self.key}={json.dumps(list(self.choices), ensure_ascii=False)}"
        return f"{self.key}={self.low:g}..{self.high:g}"


def build_search(recipe: Recipe, words: Sequence[str] = ()) -> list[Dimension]:
    """The dimensions that words say: `training.learning_rate=1e-5..1e-3`, `model.method=[full, head]`.

    Without words: `learning_rate` from a tenth to ten times the recipe's (of `auto`, 1e-4), and
    `weight_decay` from 0.001 to 0.3.

    Raises:
        RecipeError: the recipe cannot be searched; or a word is no search, its key none that can be searched,
            or its values are none that the recipe could have.
    """
    rate = recipe.training.learning_rate
    middle = 1e-4 if rate == "auto" else rate
    default = [
        Dimension("training.learning_rate", float(f"{middle / 10:.3g}"), float(f"{middle * 10:.3g}")),
        Dimension("training.weight_decay", 1e-3, 0.3),
    ]
    search = [_parse(word) for word in words] or default
    keys = [dimension.key for dimension in search]
    if twice := next((key for number, key in enumerate(keys) if key in keys[:number]), None):
        raise RecipeError(f"--search {twice}: is said twice")
    for dimension in search:
        for value in dimension.values:
            _check(with_settings(recipe, {dimension.key: value}, f"--search {dimension}"), keys)
    return search


def _parse(word: str) -> Dimension:
    key, equals, text = word.partition("=")
    form = "expected key=low..high or key=[a, b], such as training.learning_rate=1e-5..1e-3"
    if not equals:
        raise RecipeError(f"--search {word}: {form}")
    section = key.partition(".")[0]
    if key in FIXED:
        raise RecipeError(f"--search {word}: {key} cannot be searched: {FIXED[key]}")
    if section not in SECTIONS and key != BALANCED:
        others = f"only keys of {', '.join(SECTIONS)}, and {BALANCED}, can be searched"
        raise RecipeError(f"--search {word}: {others}: the trials are compared on the same images")
    low, dots, high = text.partition("..")
    if dots and not text.lstrip().startswith("["):  # as [../a, ../b] does
        if high.startswith("."):
            raise RecipeError(f"--search {word}: between the ends of a range stand two dots; {form}")
        ends = [read_value(low, word), read_value(high, word)]
        if not all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends):
            raise RecipeError(f"--search {word}: the ends of a range are numbers; {form}")
        if not ends[0] < ends[1]:
            raise RecipeError(f"--search {word}: a range goes from the lower end to the higher one")
        if all(isinstance(end, int) for end in ends) and ends[1] == ends[0] + 1:
            raise RecipeError(
                f"--search {word}: between these whole numbers is none: write {ends[0]}.0..{ends[1]}.0 for "
                f"what lies between, or {key}=[{ends[0]}, {ends[1]}] for these two"
            )
        return Dimension(key, *ends)
    choices = read_value(text, word)
    if not isinstance(choices, list) or len(choices) < 2:
        raise RecipeError(f"--search {word}: {form}")
    return Dimension(key, choices=tuple(choices))


def _check(recipe: Recipe, searched: Iterable[str]) -> None:
    training = recipe.training
    if recipe.model.method == "linear_probe":
        raise RecipeError("tune: a linear probe finds its penalty itself: there is nothing to tune")
    if recipe.data.streaming:
        raise RecipeError(
            "tune: every trial reads the images again, so they must lie here: no data.streaming"
        )
    if training.eval_strategy == "no":
        raise RecipeError(
            "tune: trials are compared at their evaluations: write training.eval_strategy: epoch"
        )
    if training.learning_rate == "auto" and "training.learning_rate" not in searched:
        raise RecipeError(
            "tune: training.learning_rate=auto would be tested in each trial: search it, or write a number"
        )


def with_settings(recipe: Recipe, settings: dict[str, Any], source: str = "recipe") -> Recipe:
    """The recipe with other values for some keys, given by their paths.

    Raises:
        RecipeError: an unknown key, a value of the wrong type, or values that do not go together.
    """
    values = recipe.model_dump(mode="json", exclude_unset=True)
    for key, value in settings.items():
        *parents, last = key.split(".")
        place = values
        for parent in parents:
            if not isinstance(place.get(parent), dict):
                place[parent] = {}
            place = place[parent]
        place[last] = value
    return build_recipe(values, recipe.name, source)
