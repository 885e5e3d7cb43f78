"""Recipes: plain YAML read, checked and explained before anything heavy is imported.

A recipe is data: sections `data`, `augmentation`, `model`, `training`, `evaluation` and `hub`, each a frozen
pydantic model that knows its keys. `training` also takes every field of `transformers.TrainingArguments`,
which `trainer_fields` reads from that class's source text, as importing it takes seconds and loads torch.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from vit_finetune.trainer_fields import read_trainer_fields

Fraction = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]


class RecipeError(ValueError):
    """A recipe, or an override of one, that cannot be used; its text is the whole message for the user."""


class Section(BaseModel):
    """A part of a recipe: immutable, and closed to keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class DataConfig(Section):
    """Section `data:`: where the images are and how they are split."""

    path: str
    """A folder, an archive (.zip, .tar…), a table (.csv, .jsonl, .parquet), a Hub dataset, or `digits`."""
    subset: str | None = None
    """Configuration name of a Hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset."""
    image_column: str | None = None
    """Column of a table or Hub dataset with the image or its file name; found by name and type if unset."""
    label_column: str | None = None
    """Column of a table or Hub dataset that holds the class; found by name and type if unset."""
    class_folder: Literal["first", "last"] | None = None
    """Which folder above an image names its class; needed only where folders are nested in two ways."""
    validation_fraction: Fraction = 0.1
    """Share of the training images carved out for validation where the data has no validation split."""
    test_fraction: Fraction = 0.1
    """Share of the training images carved out for the test where the data has no test split."""
    split_seed: Annotated[int, Field(ge=0)] = 0
    """Decides which images are carved out; apart from `training.seed`, so that runs stay comparable."""
    on_unreadable: Literal["stop", "skip"] = "stop"
    """What to do about images that cannot be decoded: stop and list them, or leave them out and say so."""

    @model_validator(mode="after")
    def _leaves_training_images(self) -> DataConfig:
        if self.validation_fraction + self.test_fraction >= 0.9:
            raise ValueError(
                "validation_fraction + test_fraction must stay below 0.9: something is needed to train on"
            )
        return self


class AugmentationConfig(Section):
    """Section `augmentation:`: how training images are varied (torchvision.transforms.v2 on uint8)."""

    crop_scale: tuple[float, float] | None = (0.5, 1.0)
    """Share of an image's area that a random resized crop keeps; `null` resizes as in evaluation instead."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width by height of the random crop, before it is resized."""
    horizontal_flip: Probability = 0.5
    policy: Literal["none", "trivialaugment", "randaugment"] = "none"
    """TrivialAugmentWide (Müller and Hutter, 2021) or RandAugment (Cubuk et al., 2019)."""
    randaugment_num_ops: Positive = 2
    randaugment_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    random_erasing: Probability = 0.0
    """Share of training images with one rectangle painted over in the mean colour (Zhong et al., 2017)."""

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _is_range(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 < value[0] <= value[1]:
            raise ValueError("must be [low, high] with 0 < low <= high")
        return value

    @field_validator("crop_scale")
    @classmethod
    def _is_share(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[1] > 1:
            raise ValueError("is a share of the image's area: at most 1")
        return value


class ModelConfig(Section):
    """Section `model:`: pretrained from `path`, or from scratch by `config`."""

    path: str | None = None
    """A Hub id or a checkpoint folder to fine-tune."""
    revision: str | None = None
    """Branch, tag or commit of a Hub checkpoint."""
    config: dict[str, Any] | None = None
    """A configuration to train from scratch, in transformers' names; `model_type` is `vit` if unset."""
    image_size: Positive | tuple[Positive, Positive] | None = None
    """Side, or [height, width], in pixels; the checkpoint's own if unset."""
    resize: Literal["squash", "crop"] | None = None
    """How evaluation fits an image: squashed to `image_size`, or shortest edge resized and centre cropped;
    the checkpoint's own way if unset."""
    crop_fraction: Annotated[float, Field(gt=0, le=1)] = 0.875
    """With `resize: crop`, the crop's side by the shortest edge it is cut from."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = "auto"

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.path is None) == (self.config is None):
            raise ValueError(
                "write one of `path` (a checkpoint to fine-tune) and `config` (a model to train from scratch)"
            )
        return self


class EvaluationConfig(Section):
    """Section `evaluation:`: how splits are scored."""

    batch_size: Positive = 64
    """Images per device and step when scoring; scores do not depend on it."""
    num_mistakes: Annotated[int, Field(ge=0, le=200)] = 24
    """How many of the worst mistakes the report shows."""


class HubConfig(Section):
    """Section `hub:`: what the model card says about the published model."""

    model_id: str | None = None
    """`owner/name` of the model on the Hub."""
    license: str | None = None
    """Licence identifier of the published weights, such as `apache-2.0`."""
    tags: list[str] = []


class TrainingConfig(Section):
    """Section `training:`: TrainingArguments' fields, with defaults that suit images, and ours.

    The fields below are those whose defaults differ from the Trainer's or that it lacks; `training_section()`
    adds the others. `auto` is decided for the machine by `training.hardware`.
    """

    output_dir: str | None = None
    """The run folder; `runs/<recipe name>` if unset."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 5.0
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: Annotated[float, Field(ge=0)] = 0.05
    """Steps, or below 1 a share of all steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rate of each layer by that of the layer above it (Bao et al., 2021, BEiT); 1 is off."""
    label_smoothing_factor: Fraction = 0.0
    per_device_train_batch_size: Positive | Literal["auto"] = 32
    gradient_accumulation_steps: Positive = 1
    bf16: bool | Literal["auto"] = "auto"
    fp16: bool | Literal["auto"] = "auto"
    dataloader_num_workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    use_cpu: bool = False
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: Positive | None = 2
    load_best_model_at_end: bool = True
    metric_for_best_model: str | None = "accuracy"
    optim: str = "adamw_torch_fused"
    logging_steps: Annotated[float, Field(gt=0)] = 10
    report_to: str | list[str] | None = "none"
    seed: int = 42


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
            try:
                return {**values, "training": training_section().model_validate(section or {})}
            except ValidationError as error:
                raise _Nested("training", error) from None
        return values

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


class _Nested(Exception):
    """Carries a section's own errors past pydantic, which cannot merge them into the recipe's."""

    def __init__(self, section: str, error: ValidationError) -> None:
        self.section, self.error = section, error


# --------------------------------------------------------------------------- the training section's many keys

REFUSED_TRAINING_KEYS = {
    "push_to_hub": "pushing is configured in `hub:`",
    "per_device_eval_batch_size": "write evaluation.batch_size",
    "resume_from_checkpoint": "use `vit-finetune train --resume`",
    "remove_unused_columns": "the image columns are always kept",
    "label_names": "the label column is data.label_column",
    "disable_tqdm": "progress goes to the terminal where there is one",
    "activation_checkpointing": "write gradient_checkpointing",
    "activation_checkpointing_kwargs": "write gradient_checkpointing_kwargs",
    "auto_find_batch_size": "write per_device_train_batch_size: auto",
    "do_train": "use the verbs `train` and `evaluate`",
    "do_eval": "use the verbs `train` and `evaluate`",
    "do_predict": "use the verbs `train` and `predict`",
    "local_rank": "the launcher sets it",
}
"""Fields of TrainingArguments that a recipe says elsewhere or not at all; and what to write."""


@functools.cache
def training_section() -> type[TrainingConfig]:
    """`TrainingConfig` with the other fields of the installed `transformers.TrainingArguments`."""
    fields: dict[str, Any] = {}
    for name, (kind, default) in read_trainer_fields().items():
        if name.startswith(("hub_", "trackio_")) or name in REFUSED_TRAINING_KEYS:
            continue
        ours = TrainingConfig.model_fields.get(name)
        if ours is None:
            fields[name] = (kind, default)
        elif get_args(kind):  # one of a few words: the Trainer's words, our default
            fields[name] = (kind, ours.default)
    return create_model("TrainingConfig", __base__=TrainingConfig, __module__=__name__, **fields)


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


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(
            f"{override}: an override is written key.path=value, such as training.num_train_epochs=3"
        )
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{override}: the value is not valid YAML: {_yaml_problem(error)}") from None
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
        hint = "known are the fields of transformers.TrainingArguments and layer_decay"
    else:
        hint = f"known: {', '.join(siblings)}"
    return f"{key} is not a recipe key; {hint}"
