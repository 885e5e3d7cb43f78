"""Recipes: what is read, what is refused, and in which words."""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path

import pytest
from pydantic import ValidationError

import vit_finetune
from vit_finetune.recipe import (
    REFUSED_TRAINING_KEYS,
    Recipe,
    RecipeError,
    TrainingConfig,
    bundled_recipes,
    load_recipe,
    training_section,
)

NO_REFS = [
    "''",
    "'a b'",
    "'a~'",
    "-x",
    "a..b",
    "/a",
    "a/",
    "a.",
    "a//b",
    "a/.b",
    "a.lock",
    "'@'",
    "refs/pr/1",
    "HEAD",
    "'a:b'",
]
SMALLEST = "data: {path: photos}\nmodel: {path: someone/vit}\n"


def write(text: str) -> Path:
    path = Path("mine.yaml")
    path.write_text(text, encoding="utf-8")
    return path


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(text), overrides)
    return str(caught.value)


def test_smallest_recipe_has_every_default_and_names_its_run_after_the_file() -> None:
    recipe = load_recipe(write(SMALLEST))
    assert recipe.data.path == "photos"
    assert recipe.augmentation.crop_scale == (0.5, 1.0)
    assert recipe.evaluation.num_mistakes == 24
    assert recipe.output_dir == Path("runs/mine")


@pytest.mark.parametrize("written", ["1e-4", "1E-4", "1.e-4", ".1e-3", "+1e-4", "1.0e-4", "0.0001"])
def test_exponents_are_numbers_in_files_and_overrides(written: str) -> None:
    in_file = load_recipe(write(SMALLEST + f"training: {{learning_rate: {written}}}"))
    overridden = load_recipe(write(SMALLEST), [f"training.learning_rate={written}"])
    assert in_file.training.learning_rate == overridden.training.learning_rate == 1e-4
    free = load_recipe(write(SMALLEST), [f"training.lr_scheduler_kwargs={{min_lr: {written}}}"])
    assert free.training.lr_scheduler_kwargs == {"min_lr": 1e-4}  # where no type turns text into a number


def test_a_name_that_only_looks_like_an_exponent_stays_text() -> None:
    assert load_recipe(write(SMALLEST), ["data.path=1e-4x"]).data.path == "1e-4x"


def test_overrides_reach_absent_sections_and_nested_keys_and_win() -> None:
    text = "data: {path: photos}\nmodel: {config: {hidden_size: 8}}\naugmentation: {horizontal_flip: 0.1}\n"
    overrides = [
        "augmentation.horizontal_flip=0.2",
        "model.config.patch_size=4",
        "training.seed=7",
        "augmentation.crop_scale=null",
        "data.path=a=b",
    ]
    recipe = load_recipe(write(text), overrides)
    assert recipe.augmentation.horizontal_flip == 0.2
    assert recipe.augmentation.crop_scale is None
    assert recipe.model.config == {"hidden_size": 8, "patch_size": 4}
    assert recipe.training.seed == 7
    assert recipe.data.path == "a=b"


@pytest.mark.parametrize("section", ["augmentation:", "training:", "evaluation: ~", "hub: {}"])
def test_an_empty_section_means_its_defaults(section: str) -> None:
    assert load_recipe(write(SMALLEST + section)).to_yaml() == load_recipe(write(SMALLEST)).to_yaml()


def test_recipes_are_frozen() -> None:
    recipe = load_recipe(write(SMALLEST))
    with pytest.raises(ValidationError, match="frozen"):
        recipe.data = recipe.data  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        recipe.training.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "key", "hints"),
    [
        ("augmentatoin.policy=none", "augmentatoin", ["augmentation"]),
        ("data.pth=x", "data.pth", ["data.path"]),
        ("training.layer_deccay=1", "training.layer_deccay", ["training.layer_decay"]),
        (
            "training.dataloader_prefetch=1",
            "training.dataloader_prefetch",
            ["training.dataloader_prefetch_factor"],
        ),
        ("training.epochs=1", "training.epochs", ["training.num_train_epochs"]),
        ("training.image_size=8", "training.image_size", ["model.image_size"]),
        ("learning_rate=1", "learning_rate", ["training.learning_rate"]),
        ("data.seed=1", "data.seed", ["data.split_seed", "training.seed"]),
        ("foo.bar=1", "foo", ["data", "augmentation", "model", "training", "evaluation", "hub"]),
        ("hub.foo=1", "hub.foo", ["model_id", "license", "tags"]),
        ("training.mixup=1", "training.mixup", ["transformers.TrainingArguments"]),
        ("name=other", "name", ["data"]),
        ("1=2", "1", ["data"]),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_and_the_file(
    override: str, key: str, hints: list[str]
) -> None:
    said = refusal(SMALLEST, override)
    assert said.startswith(f"mine.yaml: {key} is not a recipe key; ")
    assert "\n" not in said
    for hint in hints:
        assert hint in said.partition(";")[2]


def test_keys_that_are_no_words_are_refused_in_files() -> None:
    assert "mine.yaml: 1 is not a recipe key" in refusal(SMALLEST + "1: 2")
    assert "mine.yaml: training.3 is not a recipe key" in refusal(SMALLEST + "training: {3: 4}")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.learning_rate=fast", "training.learning_rate: found 'fast', expected a number"),
        ("training.learning_rate=0", "training.learning_rate: found 0, expected greater than 0"),
        ("training.seed=1.5", "training.seed: found 1.5, expected a whole number"),
        ("training.gradient_checkpointing=perhaps", "found 'perhaps', expected true or false"),
        (
            "training.per_device_train_batch_size=big",
            "training.per_device_train_batch_size: found 'big', expected a whole number or 'auto'",
        ),
        ("training.save_steps=[1]", "training.save_steps: found [1], expected a number"),
        ("data.on_unreadable=ignore", "data.on_unreadable: found 'ignore', expected 'stop' or 'skip'"),
        ("augmentation.policy=randaug", "'threeaugment'; did you mean randaugment?"),
        ("training.lr_scheduler_type=cosin", "; did you mean cosine?"),
        ("data.path=2024", "data.path: found 2024, expected text (a number as text is written in quotes)"),
        ("model.image_size=[1, 2, 3]", "found [1, 2, 3], expected a whole number or a list of 2 numbers"),
        ("augmentation.crop_scale=[1]", "augmentation.crop_scale: found [1], expected a list of 2 numbers"),
        (
            "augmentation.crop_scale=[0.9, 0.2]",
            "augmentation.crop_scale: must be [low, high] with 0 < low <= high",
        ),
        (
            "augmentation.crop_scale=[0.9, 2]",
            "augmentation.crop_scale: is a share of the image's area: at most 1",
        ),
        ("data.validation_fraction=0.8", "data: validation_fraction + test_fraction must stay below 0.9"),
        ("data.fold=3", "data.fold: found 3, expected text"),
        ("data.fold=6/5", "data.fold: is a part and the number of parts, at least two: 1/5 to 5/5 for five"),
        ("data.fold=0/5", "data.fold: is a part and the number of parts"),
        ("data.fold=1/1", "data.fold: is a part and the number of parts"),
        ("data.fold=-1/5", "data.fold: is a part and the number of parts"),
        ("data.per_class=0", "data.per_class: found 0"),
        ("model.config={}", "model: write one of `path` (a checkpoint to fine-tune) and `config`"),
        ("training=[1]", "training is a section: expected keys below it, found [1]"),
        ("data=3", "data is a section: expected keys below it, found 3"),
        ("hub.tag=main", "hub: main is a branch already: write another tag"),
        *((f"hub.tag={name}", "hub.tag: is no name for a branch or tag") for name in NO_REFS),
        *((f"hub.revision={name}", "hub.revision: is no name for a branch or tag") for name in NO_REFS),
        ("training.eval_strategy=never", "found 'never', expected 'no', 'steps' or 'epoch'"),
    ],
)
def test_wrong_values_are_explained(override: str, expected: str) -> None:
    said = refusal(SMALLEST, override)
    assert said.startswith("mine.yaml: ")
    assert expected in said
    assert "\n" not in said


@pytest.mark.parametrize("name", ["v1.0", "dev/x", "a-b_c", "größe", "@me", "release+1"])
def test_names_of_branches_and_tags_are_gits(name: str) -> None:
    hub = load_recipe(write(SMALLEST), [f"hub.tag='{name}'", f"hub.revision='{name}x'"]).hub
    assert (hub.tag, hub.revision) == (name, f"{name}x")


def test_splits_that_are_repeated_leave_nothing_to_choose() -> None:
    said = refusal(SMALLEST, "data.splits=runs/one", "data.fold=1/5", "data.per_class=4")
    assert (
        "data: splits names the split of every image already: leave out fold and per_class, or splits" in said
    )
    assert "leave out group, or" in refusal(SMALLEST, "data.splits=runs/one", "data.group=x")


def test_every_problem_has_its_line() -> None:
    said = refusal("data: {pth: x, split_seed: a}\nmodel: {path: m}\n")
    assert said.splitlines() == [
        "mine.yaml: the key data.path is missing",
        "mine.yaml: data.split_seed: found 'a', expected a whole number",
        "mine.yaml: data.pth is not a recipe key; did you mean data.path?",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: {path: x}", "mine.yaml: the section model is missing"),
        ("model: {path: x}", "mine.yaml: the section data is missing"),
        (
            "- data\n- model",
            "mine.yaml: a recipe is a mapping with the sections data, augmentation, model, training",
        ),
        ("", "mine.yaml: a recipe is a mapping"),
        (
            SMALLEST + "hub:\n  license: a\n  license: b\n",
            "line 5, column 3: the key 'license' is written twice",
        ),
        (SMALLEST + "data: {path: y}", "line 3, column 1: the key 'data' is written twice"),
        ("data: {path: x", "mine.yaml: not valid YAML: line 1"),
        (SMALLEST + "x: !!python/object/apply:os.getcwd []", "mine.yaml: not valid YAML: line 3"),
    ],
)
def test_what_is_no_recipe_is_refused(text: str, expected: str) -> None:
    said = refusal(text)
    assert expected in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.path", "data.path: an override is written key.path=value"),
        ("=3", "=3: an override is written key.path=value"),
        ("data.path=[a", "data.path=[a: the value is not valid YAML: line 1"),
        ("data.path.x=3", "data.path.x=3: path is not a section"),
    ],
)
def test_a_broken_override_is_named(override: str, expected: str) -> None:
    assert refusal(SMALLEST, override).startswith(expected)


def test_files_that_cannot_be_read_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(SMALLEST)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"^mine\.yaml: not valid YAML: 'utf-8' codec"):
        load_recipe(path)

    def denied(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(RecipeError, match=r"^mine\.yaml: cannot be read: Permission denied$"):
        load_recipe(path)


@pytest.mark.parametrize("written", ["no", "'no'", "false"])
def test_bare_no_is_a_strategy(written: str) -> None:
    file = write(SMALLEST + f"training: {{eval_strategy: {written}, load_best_model_at_end: false}}")
    assert load_recipe(file).training.eval_strategy == "no"


@pytest.mark.parametrize("written", ["off", "'off'", "false"])
def test_bare_off_is_no_cache(written: str) -> None:
    """YAML reads it as false."""
    assert load_recipe(write(SMALLEST), [f"data.cache={written}"]).data.cache == "off"
    assert load_recipe(write(f"data: {{path: x, cache: {written}}}\nmodel: {{path: y}}")).data.cache == "off"


def test_the_best_checkpoint_needs_evaluations_where_it_saves() -> None:
    said = refusal(SMALLEST, "training.eval_strategy=steps")
    assert "eval_strategy is steps and save_strategy is epoch. Write the same for both" in said


def test_refused_training_keys_say_what_to_write() -> None:
    for key, advice in {**REFUSED_TRAINING_KEYS, "hub_token": "`hub:`", "trackio_space_id": "`hub:`"}.items():
        said = refusal(SMALLEST, f"training.{key}=x")
        assert said.startswith(f"mine.yaml: training.{key} is not taken here: ")
        assert advice in said


def test_no_recipe_leaves_images_out() -> None:
    said = refusal(SMALLEST, "training.dataloader_drop_last=true")
    assert "training.dataloader_drop_last: found True, expected False" in said


def test_the_training_section_is_the_installed_training_arguments() -> None:
    from transformers import TrainingArguments

    from vit_finetune.training.arguments import ViTTrainingArguments

    real = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    ours = {field.name for field in dataclasses.fields(ViTTrainingArguments)} - set(real)
    section = training_section().model_fields
    refused = {name for name in real if name.startswith(("hub_", "trackio_"))} | set(REFUSED_TRAINING_KEYS)
    assert set(section) == (set(real) - refused) | ours
    assert set(REFUSED_TRAINING_KEYS) <= set(real)
    for name in set(section) - set(TrainingConfig.model_fields):
        factory = real[name].default_factory
        default = real[name].default if factory is dataclasses.MISSING else factory()
        expected = default.value if isinstance(default, enum.Enum) else default
        assert section[name].default == expected, name
    assert (
        section["optim"].default == real["optim"].default
    )  # the Trainer computes it, so that we have to write it


def test_the_resolved_recipe_reads_back_as_itself() -> None:
    recipe = load_recipe(write(SMALLEST), ["training.output_dir=out", "augmentation.crop_ratio=[0.9, 1.1]"])
    again = load_recipe(write(recipe.to_yaml()))
    assert again.model_dump() == recipe.model_dump()
    assert again == recipe
    for name in set(Recipe.model_fields) - {"name"}:
        section = getattr(again, name)
        assert section.model_fields_set == set(type(section).model_fields), "a default was not written out"


def test_the_resolved_recipe_names_the_run_folder() -> None:
    assert "output_dir: runs/mine\n" in load_recipe(write(SMALLEST)).to_yaml()


def test_only_what_was_set_is_written_where_asked() -> None:
    recipe = load_recipe(write(SMALLEST), ["training.seed=3"])
    assert recipe.to_yaml(resolved=False) == (
        "data:\n  path: photos\nmodel:\n  path: someone/vit\ntraining:\n  seed: 3\n"
    )


def test_every_bundled_recipe_loads() -> None:
    folder = Path(vit_finetune.__file__).parent.parent / "recipes"
    files = [path for path in folder.rglob("*.yaml") if "accelerate" not in path.relative_to(folder).parts]
    found = bundled_recipes()
    assert len(found) == len(files) > 0
    assert set(found.values()) == set(files)
    for name, path in found.items():
        assert isinstance(load_recipe(name), Recipe)
        assert path.read_text(encoding="utf-8").startswith("# ")


def test_launcher_configs_are_no_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("recipes/a.yaml", "recipes/more/b.yaml", "recipes/accelerate/ddp.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("# a\n")
    monkeypatch.setattr("vit_finetune.recipe.__file__", str(tmp_path / "recipe.py"))
    assert list(bundled_recipes()) == ["a", "b"]


def test_a_recipe_that_is_not_there_is_named_with_the_nearest() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("digitz")
    assert str(caught.value).startswith("digitz: no such recipe file, and no bundled recipe of that name.")
    assert "Did you mean `digits`?" in str(caught.value)


def test_a_file_goes_before_a_bundled_recipe_of_its_name() -> None:
    Path("digits").write_text(SMALLEST)
    assert load_recipe("digits").data.path == "photos"


def test_a_number_sign_in_an_override_is_no_comment() -> None:
    assert load_recipe("digits", ["data.path=my photos #2"]).data.path == "my photos #2"
