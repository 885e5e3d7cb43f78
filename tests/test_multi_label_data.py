"""Images with several labels: how tables and datasets say it, how they are carved, kept and looked at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from drawn_data import hash_of
from labelled_shapes import (
    NAMES,
    SHAPES,
    draw_labels,
    draw_shapes,
    flag_rows,
    write_images,
    write_jsonl,
    write_rows,
)

from vit_finetune.data.checkup.checkup import check_up, explain_errors
from vit_finetune.data.sources.columns import Source, build_dataset, column_values
from vit_finetune.data.sources.hub import arrange_columns
from vit_finetune.data.sources.labels import count_labels, label_names, label_texts, strata, with_labels
from vit_finetune.data.sources.source import load_source
from vit_finetune.data.splits.carving import carve, load_splits
from vit_finetune.data.splits.files import save_splits
from vit_finetune.data.splits.prepared import fingerprint, prepare_splits
from vit_finetune.files import write_text
from vit_finetune.recipe import DataConfig, Recipe, RecipeError, build_recipe
from vit_finetune.run import Finding, Run, RunError


def several(path: str | Path, **options: Any) -> DataConfig:
    return DataConfig.model_validate({"path": str(path), "multi_label": True, **options})


def names_by_id(dataset: datasets.Dataset) -> dict[str, list[str]]:
    return dict(zip(column_values(dataset, "id"), map(json.loads, label_texts(dataset).to_pylist())))


def drawn_source(labels: list[list[int]], classes: int, **columns: list[str | None]) -> Source:
    """A source without pictures."""
    ids = [f"{number}.jpg" for number in range(len(labels))]
    images = pa.StructArray.from_arrays([pa.nulls(len(ids), pa.binary()), pa.array(ids)], ["bytes", "path"])
    names = [f"c{number}" for number in range(classes)]
    groups = pa.array(columns["group"], pa.string()) if "group" in columns else None
    dataset = build_dataset(ids, images, pa.array(labels, pa.list_(pa.int64())), names, groups)
    return Source("table", {"all": dataset}, names)


def draw_sets(count: int, classes: int, seed: int) -> list[list[int]]:
    """Label sets in which the first labels are frequent and the last rare; some images have none."""
    random = np.random.default_rng(seed)
    shares = np.linspace(0.5, 0.06, classes)
    return [np.flatnonzero(random.random(classes) < shares).tolist() for _ in range(count)]


# --------------------------------------------------------------------------- the recipe


def recipe_of(**sections: dict[str, Any]) -> Recipe:
    values: dict[str, Any] = {"data": {"path": "photos.jsonl", "multi_label": True}, "model": {"path": "vit"}}
    return build_recipe(
        {name: {**values.get(name, {}), **sections.get(name, {})} for name in {**values, **sections}}
    )


def test_the_metric_is_that_of_several_labels() -> None:
    assert recipe_of().training.metric_for_best_model == "mean_average_precision"
    assert "metric_for_best_model" not in recipe_of().to_yaml(resolved=False)
    assert recipe_of(data={"multi_label": False}).training.metric_for_best_model == "accuracy"
    for word in ("macro_f1", "micro_f1", "loss", "mean_average_precision"):
        chosen = recipe_of(training={"metric_for_best_model": word})
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
        recipe_of(**sections)
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
        ("t.jsonl", [{"labels": ["a"]}], {}, "found one class only"),
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


# --------------------------------------------------------------------------- splits


def plain_strata(labels: list[list[int]], classes: int) -> list[int]:
    counts = [sum(number in some for some in labels) for number in range(classes)]
    return [min(some, key=lambda number: (counts[number], number)) if some else classes for some in labels]


@pytest.mark.parametrize("seed", range(5))
def test_an_image_counts_for_the_rarest_of_its_labels(seed: int) -> None:
    labels = draw_sets(80, 6, seed)
    found, names = strata(drawn_source(labels, 6).splits["all"])
    assert found.tolist() == plain_strata(labels, 6)
    assert names == [*(f"c{number}" for number in range(6)), "no label"]


@pytest.mark.parametrize("seed", range(5))
def test_carving_gives_each_stratum_its_share_by_hash(seed: int) -> None:
    labels = draw_sets(300, 6, seed)
    config = several("drawn", validation_fraction=0.2, test_fraction=0.1)
    splits = carve(drawn_source(labels, 6), config)
    of = {identity: name for name, split in splits.items() for identity in column_values(split, "id")}
    assert len(of) == 300
    stratum_of = plain_strata(labels, 6)
    for stratum in set(stratum_of):
        ids = [f"{n}.jpg" for n, value in enumerate(stratum_of) if value == stratum]
        ordered = sorted(ids, key=hash_of)
        test, validation = max(1, round(len(ids) * 0.1)), max(1, round(len(ids) * 0.2))
        assert {name for name in ids if of[name] == "test"} == set(ordered[:test])
        assert {name for name in ids if of[name] == "validation"} == set(ordered[-validation:])
    counts = {name: count_labels(split) for name, split in splits.items()}
    total = sum(counts.values())
    assert np.abs(counts["validation"] - 0.2 * total).max() < 0.08 * 300


def test_folds_validate_every_image_once() -> None:
    labels = draw_sets(120, 4, 1)
    seen = [
        identity
        for part in range(1, 5)
        for identity in column_values(
            carve(drawn_source(labels, 4), several("drawn", fold=f"{part}/4"))["validation"], "id"
        )
    ]
    test = column_values(carve(drawn_source(labels, 4), several("drawn", fold="1/4"))["test"], "id")
    assert sorted(seen + test) == sorted(f"{number}.jpg" for number in range(120))


def test_groups_stay_together() -> None:
    labels = draw_sets(200, 4, 2)
    groups: list[str | None] = [f"g{number // 4}" for number in range(200)]
    splits = carve(drawn_source(labels, 4, group=groups), several("drawn", group="group"))
    where = {group: name for name, split in splits.items() for group in column_values(split, "group")}
    assert all(
        where[group] == name for name, split in splits.items() for group in column_values(split, "group")
    )
    assert set(where.values()) == {"train", "validation", "test"}


def test_a_label_that_is_too_rare_to_be_split_is_an_error() -> None:
    labels = [[0]] * 20 + [[1]] * 20 + [[0, 2], [2]]
    with pytest.raises(RunError, match=r"1 of 3 classes have too few images .*: c2 \(2\)"):
        carve(drawn_source(labels, 3), several("drawn"))


def test_a_label_that_is_seldom_the_rarest_is_not_too_rare() -> None:
    """c1 has seven images, and but one for which it counts."""
    labels = [[0]] * 30 + [[1]] + [[1, 2]] * 3 + [[1, 3]] * 3 + [[2], [3]]
    splits = carve(drawn_source(labels, 4), several("drawn"))
    assert plain_strata(labels, 4).count(1) == 1
    assert sum(count_labels(split)[1] for split in splits.values()) == 7


def test_a_carved_split_without_a_label_is_said() -> None:
    """c1 comes with rarer labels only, and so is carved as they are."""
    labels = [[0]] * 40 + [[1, number] for number in range(2, 6)] + [[number] for number in range(2, 6)] * 2
    lacking = untrained = 0
    for seed in range(10):
        source = drawn_source(labels, 6)
        try:
            splits = carve(source, several("drawn", split_seed=seed))
        except RunError as error:
            assert "no image of c1 is left to train on" in str(error)
            assert str(error).endswith("or draw other splits with data.split_seed")
            untrained += 1
            continue
        for name in ("validation", "test"):
            absent = not count_labels(splits[name])[1]
            said = f"{name} has no image of c1: its scores there say nothing"
            said += ", and its threshold stays at 0.5" if name == "validation" else ""
            assert source.notices.count(said) == absent
            lacking += absent
    assert lacking
    assert untrained


def test_splits_are_written_and_read_back(tmp_path: Path) -> None:
    table = write_jsonl(tmp_path / "photos", 40)
    config = several(table, validation_fraction=0.25, test_fraction=0.25)
    splits = load_splits(config)
    save_splits(splits, Run(tmp_path / "run"))
    lines = (tmp_path / "run" / "splits" / "test.csv").read_text().splitlines()
    first, names = next(iter(names_by_id(splits["test"]).items()))
    quoted = json.dumps(names).replace('"', '""') if names else "[]"
    assert lines[:2] == ["id,label,split", f'{first},"{quoted}",test' if names else f"{first},[],test"]
    again = load_splits(several(table, splits=str(tmp_path / "run"), split_seed=7))
    for name, split in splits.items():
        assert names_by_id(again[name]) == names_by_id(split)
    # One of one's own, written otherwise; and one that says something else.
    rows = [
        (identity, names, name)
        for name, split in splits.items()
        for identity, names in names_by_id(split).items()
    ]

    def write(change: dict[str, Any]) -> str:
        lines = ["id,label,split"]
        for identity, names, name in rows:
            text = json.dumps(change.get(identity, names[::-1])).replace("[", "[ ").replace('"', '""')
            lines.append(f'{identity},"{text}",{name}')
        write_text(tmp_path / "own.csv", "\n".join(lines) + "\n")
        return str(tmp_path / "own.csv")

    assert names_by_id(load_splits(several(table, splits=write({})))["test"]) == names_by_id(splits["test"])
    first, names, _ = rows[0]
    with pytest.raises(RunError, match="1 of 40 images have another label") as refused:
        load_splits(several(table, splits=write({first: ["star"]})))
    assert f'{first} ({json.dumps(names)}, there [ "star"])' in str(refused.value)


# --------------------------------------------------------------------------- the checkup


def found(table: Path, **options: Any) -> dict[str, Finding]:
    config = several(table, **options)
    return {finding.kind: finding for finding in check_up(load_source(config), config).findings}


def test_copies_with_other_labels_and_without_any(tmp_path: Path) -> None:
    table = write_jsonl(tmp_path / "photos", 30)
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    for name, labels in (("copy.png", rows[0]["labels"]), ("other.png", ["star", "bar"])):
        (tmp_path / "photos" / name).write_bytes((tmp_path / "photos" / "000.png").read_bytes())
        rows.append({"file_name": name, "labels": labels})
    write_rows(table, rows)
    findings = found(table)
    two = findings["two-labels"]
    assert {image.id: image.detail for image in two.images} == {
        "000.png": ", ".join(rows[0]["labels"]) or "no label",
        "copy.png": ", ".join(rows[0]["labels"]) or "no label",
        "other.png": "bar, star",
    }
    unlabelled = [row["file_name"] for row in rows if not row["labels"]]
    assert [image.id for image in findings["no-label"].images] == unlabelled
    # Too few to be split, by the images that have it, not by their sets of labels.
    assert "star (1)" in findings["class-too-small"].message
    assert [image.id for image in findings["class-too-small"].images] == ["other.png"]


def test_a_label_without_training_images(tmp_path: Path) -> None:
    rows = flag_rows(tmp_path / "photos", 40)
    for number, row in enumerate(rows):
        row |= {"star": int(number == 39), "moon": 0, "split": "train" if number < 30 else "validation"}
    table = write_rows(tmp_path / "photos" / "table.csv", rows)
    config = several(table, label_column=[*SHAPES, "star", "moon"], test_fraction=0)
    findings = check_up(load_source(config), config).findings
    assert [finding.message for finding in findings if finding.severity == "error"] == [
        "train has no image of star, which is in validation only"
    ]
    assert (
        found(table, label_column=[*SHAPES, "star", "moon"])["class-empty"].message
        == "the data has no image of moon"
    )


def test_imbalance_names_no_remedy_that_is_refused(tmp_path: Path) -> None:
    labels = [["common"]] * 40 + [["rare", "common"]] * 3
    files = write_images(tmp_path, labels)
    table = write_rows(
        tmp_path / "t.jsonl", [{"file_name": file, "labels": names} for file, names in zip(files, labels)]
    )
    said = found(table)["imbalance"]
    assert said.message == "common has 43 images, rare 3: 14 times fewer"
    assert said.advice == "Read macro F1 rather than micro F1; add images of rare"


def test_leaks_and_exclusion(tmp_path: Path) -> None:
    rows = flag_rows(tmp_path / "photos", 40)
    for number, row in enumerate(rows):
        row["split"] = ["train", "validation", "test", "train"][number % 4]
    (tmp_path / "photos" / "000.png").write_bytes((tmp_path / "photos" / "002.png").read_bytes())
    rows[0] |= {name: rows[2][name] for name in SHAPES}
    table = write_rows(tmp_path / "photos" / "table.csv", rows)
    config = several(table, label_column=list(SHAPES))
    prepared = prepare_splits(config)
    assert "000.png" not in column_values(prepared.splits["train"], "id")
    checkup = check_up(load_source(config), config)
    assert explain_errors(checkup.findings, config) == ""
    write_text(tmp_path / "findings.json", checkup.document(config).to_json())
    cleaned = several(table, label_column=list(SHAPES), exclude=str(tmp_path / "findings.json"))
    assert "leak" not in {finding.kind for finding in check_up(load_source(cleaned), cleaned).findings}


def test_fingerprints_tell_labels_apart_and_not_their_order() -> None:
    def of(labels: list[list[int]], names: list[str]) -> str:
        source = drawn_source(labels, 3)
        split = source.splits["all"].add_column("digest", ["x", "y"])
        return fingerprint(with_labels(split, names))

    plain = of([[0, 1], []], ["c0", "c1", "c2"])
    assert of([[0, 1], []], ["c2", "c1", "c0"]) == plain
    assert of([[0], []], ["c0", "c1", "c2"]) != plain
