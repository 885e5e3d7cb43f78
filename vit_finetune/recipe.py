"""Recipes: plain YAML read, checked and explained before anything heavy is imported.

A recipe is data: sections `data`, `augmentation`, `model`, `training`, `evaluation` and `hub`, each a frozen
pydantic model that knows its keys. `training` also takes every field of `transformers.TrainingArguments`;
all are described in `sections`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import yaml
from pydantic import BaseModel, Field, SerializeAsAny, ValidationError, model_validator

from vit_finetune.combinations import check_combinations
from vit_finetune.sections import (
    DROP_PATH_MODELS,
    AugmentationConfig,
    DataConfig,
    EvaluationConfig,
    HubConfig,
    ModelConfig,
    Section,
)
from vit_finetune.trainer_fields import read_trainer_fields
from vit_finetune.training_section import REFUSED_TRAINING_KEYS, TrainingConfig, training_section

__all__ = [
    "DROP_PATH_MODELS",
    "AugmentationConfig",
    "DataConfig",
    "EvaluationConfig",
    "HubConfig",
    "ModelConfig",
    "Recipe",
    "RecipeError",
    "TrainingConfig",
    "build_data_config",
    "build_recipe",
    "bundled_recipes",
    "find_changes",
    "find_recipe",
    "load_recipe",
    "read_value",
    "training_section",
]


READING = (
    *("subset", "revision", "image_column", "label_column", "multi_label", "class_folder"),
    *("on_unreadable", "exclude", "group"),
)
"""Keys of `data:` that say what is read; the others say how a run divides and keeps it."""


class RecipeError(ValueError):
    """A recipe, or an override of one, that cannot be used; its text is the whole message for the user."""


class Recipe(Section):
    """What to do: one value of every key, checked."""

    name: Annotated[str, Field(exclude=True)] = "recipe"
    """The recipe file's name without its ending; names the run folder."""
    data: DataConfig
    augmentation: AugmentationConfig = AugmentationConfig()
    model: ModelConfig
    training: SerializeAsAny[TrainingConfig]
    evaluation: EvaluationConfig = EvaluationConfig()
    hub: HubConfig = HubConfig()

    @model_validator(mode="before")
    @classmethod
    def _typed_training(cls, values: Any) -> Any:
        if isinstance(values, dict) and not isinstance(values.get("training"), BaseModel):
            section = values.get("training")
            if not isinstance(section, dict | None):
                return values  # the field's own validation says what is wrong
            data = values.get("data")
            several = (
                data.get("multi_label") if isinstance(data, dict) else getattr(data, "multi_label", None)
            )
            try:
                return {**values, "training": training_section(several is True).model_validate(section or {})}
            except ValidationError as error:
                raise _Nested("training", error) from None
        return values

    @model_validator(mode="after")
    def _goes_together(self) -> Recipe:
        check_combinations(self)
        return self

    @property
    def output_dir(self) -> Path:
        """The run folder."""
        return Path(self.training.output_dir or f"runs/{self.name}").expanduser()

    def to_yaml(self, resolved: bool = True) -> str:
        """The recipe as YAML: with every default written out, or only what was set."""
        values = self.model_dump(mode="json", exclude_unset=not resolved)
        if resolved:
            values["training"]["output_dir"] = str(self.output_dir)
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)


def find_changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """What recipes say differently: a sentence by key, such as `training.seed`.

    Args:
        before: a recipe's values, as JSON has them.
        now: another's.
    """
    return {
        f"{section}.{key}": f"{section}.{key} was {before[section].get(key)!r}, is {value!r}"
        for section, keys in now.items()
        for key, value in keys.items()
        if before[section].get(key) != value
    }


class _Nested(Exception):
    """Carries a section's own errors past pydantic, which cannot merge them into the recipe's."""

    def __init__(self, section: str, error: ValidationError) -> None:
        self.section, self.error = section, error


# --------------------------------------------------------------------------- reading


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number (YAML 1.1 wants 1.0e-4) and refuses a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            position = next(key for (key, _), name in reversed(list(zip(node.value, keys))) if name == twice)
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice!r} is written twice", position.start_mark
            )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def bundled_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    package = Path(__file__).parent
    # In a wheel the recipes lie inside the package, in a checkout beside it.
    folder = package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"
    return {path.stem: path for path in sorted(folder.rglob("*.yaml")) if path.parent.name != "accelerate"}


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe given by path or by the name of a bundled one.

    Raises:
        RecipeError: neither a file nor a bundled recipe.
    """
    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    bundled = bundled_recipes()
    if str(recipe) in bundled:
        return bundled[str(recipe)]
    hint = _nearest(Path(recipe).stem, bundled)
    raise RecipeError(
        f"{recipe}: no such recipe file, and no bundled recipe of that name."
        + (f" Did you mean `{hint}`?" if hint else "")
        + f" Bundled: {', '.join(bundled)}"
    )


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, or a bundled one by name, with `key.path=value` overrides applied.

    Raises:
        RecipeError: no such recipe, broken YAML, an unknown key or a value of the wrong type.
    """
    path = find_recipe(recipe)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid YAML: {_yaml_problem(error)}") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with the sections {', '.join(_sections())}")
    for override in overrides:
        _override(values, override)
    return build_recipe(values, name=path.stem, source=str(path))


def build_recipe(values: dict[str, Any], name: str = "recipe", source: str = "recipe") -> Recipe:
    """The recipe with these values, as YAML would give them.

    Args:
        values: sections by name.
        name: names the run folder.
        source: the file that messages name.

    Raises:
        RecipeError: an unknown key or a value of the wrong type.
    """
    if "name" in values:  # a field of Recipe, but no key of a recipe
        raise RecipeError(f"{source}: {_unknown_key(('name',))}")
    values = {key: section if section is not None else {} for key, section in values.items()}
    try:
        return Recipe.model_validate({**values, "name": name})
    except _Nested as nested:
        raise RecipeError(_explain(nested.error, source, (nested.section,))) from None
    except ValidationError as error:
        raise RecipeError(_explain(error, source, ())) from None


def build_data_config(path: str, overrides: Sequence[str] = ()) -> DataConfig:
    """The section `data:` of what is only read, and not trained on: `path`, with `data.key=value` applied.

    Raises:
        RecipeError: another key than those that say what is read, or a value of the wrong type.
    """
    values: dict[str, Any] = {"data": {"path": path}}
    for override in overrides:
        section, _, key = override.partition("=")[0].partition(".")
        if section != "data" or key not in READING:
            raise RecipeError(f"{override}: expected key=value, the key of data.{', data.'.join(READING)}")
        _override(values, override)
    try:
        return DataConfig.model_validate(values["data"])
    except ValidationError as error:
        raise RecipeError(_explain(error, path, ("data",))) from None


def read_value(text: str, source: str) -> Any:
    """A value as recipes write it.

    Raises:
        RecipeError: it is not valid YAML; the message begins with the source.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: the value is not valid YAML: {_yaml_problem(error)}") from None


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(
            f"{override}: an override is written key.path=value, such as training.num_train_epochs=3"
        )
    value = read_value(text, override)
    if " #" in text and not text.lstrip().startswith(("'", '"', "[", "{")):
        value = text  # on a command line a number sign begins no comment
    *parents, last = key.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise RecipeError(f"{override}: {parent} is not a section")
    values[last] = value


# --------------------------------------------------------------------------- explaining


EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "keys below it",
    "float_parsing": "a number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "list_type": "a list",
    "string_type": "text (a number as text is written in quotes)",
    "tuple_type": "a list of 2 numbers",
    "too_long": "a list of 2 numbers",
    "missing": "a list of 2 numbers",
}
"""What pydantic's kinds of error say that it wanted, in plain words; its own message for the others."""


def _yaml_problem(error: Exception) -> str:
    """One line for what PyYAML says in several."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return str(error)


def _sections() -> list[str]:
    return [name for name, field in Recipe.model_fields.items() if not field.exclude]


def _nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate that is spelt most like the word, or else the first that contains it."""
    candidates = list(candidates)
    close = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    containing = [candidate for candidate in candidates if len(word) > 2 and word in candidate]
    return next(iter(close + containing), None)


def _keys_of(location: Sequence[str]) -> list[str]:
    """The keys that stand at a place in the recipe."""
    if not location:
        return _sections()
    section = Recipe.model_fields[location[0]].annotation if location[0] in Recipe.model_fields else None
    if location[0] == "training":
        section = training_section()
    return list(cast(type[BaseModel], section).model_fields) if section is not None else []


def _explain(error: ValidationError, source: str, prefix: tuple[str, ...]) -> str:
    """One line for each problem: the key, what was found, what was expected, what to write."""
    lines: dict[str, str] = {}
    for problem in error.errors():
        # A union's members are part of pydantic's location; the first two steps are the recipe's own.
        location = (*prefix, *(str(step) for step in problem["loc"]))[:2]
        key = ".".join(location)
        found = problem["input"]
        match problem["type"]:
            case "extra_forbidden" | "invalid_key":
                lines[key] = _unknown_key(location)
            case "missing" if len(location) == len(prefix) + len(problem["loc"]):
                what = "section" if len(location) == 1 else "key"
                lines[key] = f"the {what} {key} is missing"
            case "model_type" | "dict_type" if len(location) == 1:
                lines[key] = f"{key} is a section: expected keys below it, found {found!r}"
            case "value_error":
                lines[key] = f"{key}: {problem['ctx']['error']}" if key else str(problem["ctx"]["error"])
            case kind:
                expected = EXPECTED.get(kind, problem["msg"].removeprefix("Input should be "))
                if key not in lines:
                    lines[key] = f"{key}: found {found!r}, expected {expected}"
                elif not lines[key].endswith(expected):
                    lines[key] += f" or {expected}"
                words = _words(problem["ctx"]["expected"]) if kind == "literal_error" else []
                if hint := _nearest(str(found), words):
                    lines[key] += f"; did you mean {hint}?"
    return "\n".join(f"{source}: {line}" for line in lines.values())


def _words(expected: str) -> list[str]:
    """The words in pydantic's `'a', 'b' or 'c'`."""
    return re.findall(r"'([^']*)'", expected)


def _unknown_key(location: tuple[str, ...]) -> str:
    key, name = ".".join(location), location[-1]
    if location[0] == "training" and (name in REFUSED_TRAINING_KEYS or name.startswith(("hub_", "trackio_"))):
        instead = REFUSED_TRAINING_KEYS.get(name, "pushing is configured in `hub:`")
        return f"{key} is not taken here: {instead}"
    siblings = _keys_of(location[:-1])
    nearest = _nearest(name, siblings)
    elsewhere = [f"{section}.{name}" for section in _sections() if name in _keys_of([section])]
    suggestions = [".".join((*location[:-1], nearest))] if nearest else []
    if suggestions + elsewhere:
        hint = f"did you mean {' or '.join(suggestions + elsewhere)}?"
    elif location[0] == "training":  # too many to list
        own = [name for name in TrainingConfig.model_fields if name not in read_trainer_fields()]
        ours = f"{', '.join(own[:-1])} and {own[-1]}"
        hint = f"known are the fields of transformers.TrainingArguments, {ours}"
    else:
        hint = f"known: {', '.join(siblings)}"
    return f"{key} is not a recipe key; {hint}"
