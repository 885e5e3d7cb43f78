"""Images with several labels: what a recipe may say, and how tables and datasets say which image has which."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import datasets
import pytest
from labelled_shapes import (
    NAMES,
    SHAPES,
    draw_labels,
    draw_shapes,
    drawn_source,
    flag_rows,
    names_by_id,
    several,
    write_images,
    write_jsonl,
    write_rows,
)

from vit_finetune.data.sources.columns import column_values
from vit_finetune.data.sources.hub import arrange_columns
from vit_finetune.data.sources.labels import label_names, label_texts, with_labels
from vit_finetune.data.sources.source import load_source
from vit_finetune.publishing.dataset import upload_data
from vit_finetune.recipe import DataConfig, Recipe, RecipeError, build_recipe, load_recipe
from vit_finetune.run import RunError

# --------------------------------------------------------------------------- the recipe


def recipe_with(**sections: dict[str, Any]) -> Recipe:
    values: dict[str, Any] = {"data": {"path": "photos.jsonl", "multi_label": True}, "model": {"path": "vit"}}
    return build_recipe(
        {name: {**values.get(name, {}), **sections.get(name, {})} for name in {**values, **sections}}
    )


def test_the_metric_is_that_of_several_labels() -> None:
    assert recipe_with().training.metric_for_best_model == "mean_average_precision"
    assert "metric_for_best_model" not in recipe_with().to_yaml(resolved=False)
    assert recipe_with(data={"multi_label": False}).training.metric_for_best_model == "accuracy"
    for word in ("macro_f1", "micro_f1", "loss", "mean_average_precision"):
        chosen = recipe_with(training={"metric_for_best_model": word})
        assert chosen.training.metric_for_best_model == word


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"augmentation": {"mixup_alpha": 0.2}}, "leave out augmentation.mixup_alpha"),
        ({"augmentation": {"cutmix_alpha": 1.0}}, "leave out augmentation.cutmix_alpha"),
        ({"training": {"label_smoothing_factor": 0.1}}, "leave out training.label_smoothing_factor"),
        ({"training": {"class_weights": "auto"}}, "leave out training.class_weights"),
        ({"training": {"class_weights": {"a": 2.0}}}, "leave out training.class_weights"),
        ({"training": {"focal_gamma": 2.0}}, "leave out training.focal_gamma"),
        ({"model": {"method": "linear_probe"}}, "write model.method=head"),
        ({"training": {"metric_for_best_model": "accuracy"}}, "write one of mean_average_precision"),
        ({"training": {"metric_for_best_model": "balanced_accuracy"}}, "write one of mean_average_precision"),
        (
            {"data": {"multi_label": False}, "training": {"metric_for_best_model": "micro_f1"}},
            "have one class (data.multi_label is off): write one of accuracy",
        ),
        ({"data": {"per_class": 4}}, "per_class needs one class per image"),
        ({"data": {"balanced_sampling": True}}, "balanced_sampling needs one class per image"),
        ({"data": {"streaming": True}}, "streaming needs one class per image"),
        ({"data": {"class_folder": "last"}}, "class_folder needs one class per image"),
        ({"data": {"path": "digits"}}, "leave out multi_label"),
        ({"data": {"label_column": ["a"]}}, "at least two columns"),
        ({"data": {"label_column": ["a", "b", "a"]}}, "each named once"),
        ({"data": {"multi_label": False, "label_column": ["a", "b"]}}, "write multi_label: true"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=r"\S") as refused:
        recipe_with(**sections)
    assert said in str(refused.value)


# --------------------------------------------------------------------------- tables


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_column_of_lists(tmp_path: Path, suffix: str) -> None:
    labels = draw_labels(20)
    files = write_images(tmp_path / "photos", labels)
    rows = [{"file_name": file, "labels": names} for file, names in zip(files, labels)]
    source = load_source(several(write_rows(tmp_path / "photos" / f"table{suffix}", rows)))
    assert source.labels == NAMES
    assert names_by_id(source.splits["all"]) == dict(zip(files, map(sorted, labels)))
    assert source.splits["all"].features["label"] == datasets.List(datasets.ClassLabel(names=NAMES))
    assert any(not names for names in labels), "some image has none"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_column_per_label_keeps_their_order(tmp_path: Path, suffix: str) -> None:
    rows = flag_rows(tmp_path / "photos", 20)
    table = write_rows(tmp_path / "photos" / f"table{suffix}", rows)
    source = load_source(several(table, label_column=list(SHAPES)))
    assert source.labels == list(SHAPES) != NAMES
    expected = {row["file_name"]: sorted(name for name in SHAPES if row[name]) for row in rows}
    assert names_by_id(source.splits["all"]) == expected


def test_cells_may_say_true_and_false(tmp_path: Path) -> None:
    cells = ["0", "1", "true", "FALSE", "True", "false"]
    rows = [{"file_name": f"00{n}.png", "a": cell, "b": "1"} for n, cell in enumerate(cells)]
    write_images(tmp_path, [[] for _ in cells])
    found = names_by_id(
        load_source(several(write_rows(tmp_path / "t.csv", rows), label_column=["a", "b"])).splits["all"]
    )
    assert [("a" in names) for names in found.values()] == [False, True, True, False, True, False]
    rows = [
        {"file_name": f"00{n}.png", "a": cell, "b": 1.0} for n, cell in enumerate([0, 1, True, False, 0.0])
    ]
    found = names_by_id(
        load_source(several(write_rows(tmp_path / "t.jsonl", rows), label_column=["a", "b"])).splits["all"]
    )
    assert list(found.values()) == [["b"], ["a", "b"], ["a", "b"], ["b"], ["b"]]


@pytest.mark.parametrize(
    ("name", "rows", "options", "said"),
    [
        (
            "t.csv",
            [{"a": "yes", "b": 0}],
            {"label_column": ["a", "b"]},
            "row 1: a holds 'yes'; expected 0 or 1",
        ),
        (
            "t.csv",
            [{"a": 0, "b": 1}, {"a": 1, "b": ""}],
            {"label_column": ["a", "b"]},
            "row 2: b holds nothing",
        ),
        ("t.jsonl", [{"a": 0, "b": 2}], {"label_column": ["a", "b"]}, "row 1: b holds 2; expected 0 or 1"),
        ("t.csv", [{"a": 0, "b": 1}], {"label_column": ["a", "c"]}, "no column 'c'; found file_name, a, b"),
        ("t.csv", [{"labels": "a b"}], {}, "data.label_column='[beach, people]'"),
        ("t.jsonl", [{"labels": "a"}], {}, "row 1: labels holds 'a'; expected a list of names"),
        ("t.jsonl", [{"labels": None}], {}, "row 1: labels holds nothing; expected a list of names ([] for"),
        ("t.jsonl", [{"labels": ["a", None]}], {}, "row 1: labels holds None in its list"),
        (
            "t.jsonl",
            [{}, {"labels": ["a", "b"]}],
            {},
            "row 1: labels holds nothing; expected a list of names ([] for",
        ),
        ("t.jsonl", [{"labels": ["a"]}], {}, "found one class only"),
        (
            "t.csv",
            [{"a": 1, "split": "train"}, {"a": 0, "split": 1}],
            {"label_column": ["a", "split"]},
            "row 1: split holds 'train'; expected 0 or 1",
        ),
        ("t.jsonl", [{"labels": ["a", "b"]}], {"multi_label": False}, "write data.multi_label=true"),
    ],
)
def test_what_cells_cannot_hold(
    tmp_path: Path, name: str, rows: list[dict[str, Any]], options: dict[str, Any], said: str
) -> None:
    files = write_images(tmp_path, [[] for _ in rows])
    table = write_rows(tmp_path / name, [{"file_name": file} | row for file, row in zip(files, rows)])
    with pytest.raises(RunError) as refused:
        load_source(several(table, **options))
    assert said in str(refused.value)
    assert str(table) in str(refused.value) or "found one class" in said


def test_a_label_may_be_called_split(tmp_path: Path) -> None:
    write_images(tmp_path, [[], []])
    rows = [{"file_name": "000.png", "split": 1, "b": 0}, {"file_name": "001.png", "split": 0, "b": 1}]
    source = load_source(several(write_rows(tmp_path / "t.csv", rows), label_column=["split", "b"]))
    assert names_by_id(source.splits["all"]) == {"000.png": ["split"], "001.png": ["b"]}


@pytest.mark.parametrize(
    "options", [{"label_column": ["a", "b"]}, {"multi_label": False, "label_column": "a"}]
)
def test_two_columns_of_one_name_are_an_error(tmp_path: Path, options: dict[str, Any]) -> None:
    """csv would take the last one's cells."""
    write_images(tmp_path, [[], []])
    (tmp_path / "t.csv").write_text("file_name,a,b,a,,\n000.png,1,0,0,,\n001.png,0,1,1,,\n")
    with pytest.raises(RunError, match=r"t\.csv: two columns are called 'a'; expected a name of its own"):
        load_source(several(tmp_path / "t.csv", **options))


def test_folders_say_one_class(folder: Path) -> None:
    with pytest.raises(
        RunError, match=r"metadata\.jsonl with file_name and a list of labels, or metadata\.csv"
    ):
        load_source(several(folder))


def test_a_folder_with_a_table_in_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_jsonl(tmp_path / split, 12, seed=1)
    source = load_source(several(tmp_path))
    assert (source.kind, sorted(source.splits)) == ("folder", ["test", "train"])
    (tmp_path / "test" / "metadata.jsonl").write_text(
        '{"file_name": "000.png", "labels": ["disc", "star"]}\n'
    )
    with pytest.raises(RunError, match="'star' is only in test"):
        load_source(several(tmp_path))


# --------------------------------------------------------------------------- the Hub's columns, and Parquet


def hub_rows(**columns: Any) -> datasets.Dataset:
    count = len(next(iter(columns.values()))[0])
    images = [draw_shapes([], number) for number in range(count)]
    features = {"image": datasets.Image()} | {name: kind for name, (_, kind) in columns.items()}
    return datasets.Dataset.from_dict(
        {"image": images} | {name: values for name, (values, _) in columns.items()},
        features=datasets.Features(features),
    )


CLASS_LABELS = datasets.List(datasets.ClassLabel(names=["zebra", "ape", "cow"]))


@pytest.mark.parametrize(
    ("values", "kind", "labels", "expected"),
    [
        ([[0, 2], [], [1]], CLASS_LABELS, ["zebra", "ape", "cow"], [["cow", "zebra"], [], ["ape"]]),
        (
            [["b", "a"], [], ["b"]],
            datasets.List(datasets.Value("string")),
            ["a", "b"],
            [["a", "b"], [], ["b"]],
        ),
        ([[10, 2], [], [2]], datasets.List(datasets.Value("int64")), ["2", "10"], [["10", "2"], [], ["2"]]),
    ],
    ids=["ClassLabel", "string", "int"],
)
def test_lists_of_a_hub_dataset(values: Any, kind: Any, labels: list[str], expected: list[list[str]]) -> None:
    rows = hub_rows(objects=(values, kind))
    source = arrange_columns(datasets.DatasetDict({"train": rows}), several("owner/name"))
    assert source.labels == labels
    assert list(names_by_id(source.splits["all"]).values()) == expected
    with pytest.raises(RunError, match=r"write data\.multi_label=true"):
        arrange_columns(datasets.DatasetDict({"train": rows}), DataConfig(path="o/n", label_column="objects"))


def test_ids_that_name_no_class_are_an_error() -> None:
    rows = hub_rows(objects=([[0, 2], [-1], [1]], datasets.List(datasets.Value("int64"))))
    table = rows.data.table.replace_schema_metadata(None)
    features = datasets.Features({"image": datasets.Image(), "objects": CLASS_LABELS})
    broken = datasets.Dataset(table.cast(features.arrow_schema))
    with pytest.raises(
        RunError, match="all: row 1: objects holds -1 in its list; expected ids of its 3 classes"
    ):
        arrange_columns(datasets.DatasetDict({"train": broken}), several("owner/name"))


def test_columns_of_a_hub_dataset() -> None:
    flags, truths = datasets.Value("int32"), datasets.Value("bool")
    rows = hub_rows(night=([0, 1, 0], flags), people=([True, True, False], truths), size=([1, 2, 3], flags))
    config = several("o/n", label_column=["night", "people"])
    source = arrange_columns(datasets.DatasetDict({"train": rows}), config)
    assert list(names_by_id(source.splits["all"]).values()) == [["people"], ["night", "people"], []]
    with pytest.raises(RunError, match="all: row 1: size holds 2; expected 0 or 1"):
        arrange_columns(datasets.DatasetDict({"train": rows}), several("o/n", label_column=["night", "size"]))
    with pytest.raises(RunError, match="no column 'day'"):
        arrange_columns(datasets.DatasetDict({"train": rows}), several("o/n", label_column=["night", "day"]))


def test_rows_of_which_nothing_is_known_are_left_out() -> None:
    rows = hub_rows(objects=([[0, 2], None, [], [1]], CLASS_LABELS))
    source = arrange_columns(datasets.DatasetDict({"train": rows}), several("owner/name"))
    assert list(names_by_id(source.splits["all"])) == ["0", "2", "3"]
    assert source.notices == ["1 image left out: they have no label"]


def test_parquet_with_image_bytes(tmp_path: Path) -> None:
    rows = hub_rows(objects=([[0, 2], [], [1]], CLASS_LABELS), night=([0, 1, 1], datasets.Value("int64")),
                    day=([1, 0, 0], datasets.Value("int64")))  # fmt: skip
    (tmp_path / "shards").mkdir()
    rows.to_parquet(str(tmp_path / "shards" / "train.parquet"))
    source = load_source(several(tmp_path / "shards"))
    assert (source.kind, source.labels) == ("parquet", ["zebra", "ape", "cow"])
    (split,) = source.splits.values()
    assert list(names_by_id(split).values()) == [["cow", "zebra"], [], ["ape"]]
    source = load_source(several(tmp_path / "shards", label_column=["night", "day"]))
    (split,) = source.splits.values()
    assert list(names_by_id(split).values()) == [["day"], ["night"], ["night"]]


@pytest.mark.parametrize("multi_label", [True, False])
def test_a_label_that_the_class_names_lack(tmp_path: Path, multi_label: bool) -> None:
    labels = [["x"], ["y"], ["star"]]
    rows = [
        {"image": draw_shapes([], n), "labels": some if multi_label else some[0]}
        for n, some in enumerate(labels)
    ]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "labels": datasets.List(datasets.Value("string")) if multi_label else datasets.Value("string"),
        }
    )
    datasets.Dataset.from_list(rows, features).to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "classes.txt").write_text("x\ny\n")
    with pytest.raises(
        RunError, match=r"labels holds a label that the class names .*star.*; expected one of x, y"
    ):
        load_source(several(tmp_path, multi_label=multi_label))


def test_webdataset_is_refused(tmp_path: Path) -> None:
    import io
    import tarfile

    with tarfile.open(tmp_path / "train-000.tar", "w") as tar:
        buffer = io.BytesIO()
        draw_shapes([], 0).save(buffer, "PNG")
        for name, data in (("a.png", buffer.getvalue()), ("a.json", b'{"label": ["x", "y"]}')):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    with pytest.raises(RunError, match=r"Write them as \.parquet with a column of lists"):
        load_source(several(tmp_path / "train-000.tar"))


def test_labels_counted_in_another_order() -> None:
    dataset = drawn_source([[0, 2], [], [1]], 3).splits["all"]
    other = with_labels(dataset, ["c2", "c0", "c1"])
    assert column_values(other, "label") == [[0, 1], [], [2]]
    assert label_names(other) == ["c2", "c0", "c1"]
    assert label_texts(other).to_pylist() == ['["c0", "c2"]', "[]", '["c1"]']
    assert label_texts(dataset) == label_texts(other)


def test_the_command_of_the_card_says_all_that_is_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bundled recipe smooths labels, which only images of one class have."""
    upload_data(several(write_jsonl(tmp_path / "shapes", 30)), "ann/shapes", dry_run=True)
    command = capsys.readouterr().out.partition("vit-finetune train ")[2].partition("\n")[0]
    name, *overrides = shlex.split(command)
    recipe = load_recipe(name, overrides)
    assert recipe.data.multi_label
    assert recipe.data.path == "ann/shapes"
