"""Images with several labels: how they are carved, kept in files and looked at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn_data import hash_of
from labelled_shapes import (
    SHAPES,
    draw_sets,
    drawn_source,
    flag_rows,
    names_by_id,
    several,
    write_images,
    write_jsonl,
    write_rows,
)

from vit_finetune.data.checkup.checkup import check_up, explain_errors
from vit_finetune.data.sources.columns import column_values
from vit_finetune.data.sources.labels import count_labels, strata, with_labels
from vit_finetune.data.sources.source import load_source
from vit_finetune.data.splits.carving import carve, load_splits
from vit_finetune.data.splits.files import save_splits
from vit_finetune.data.splits.prepared import fingerprint, prepare_splits
from vit_finetune.files import write_text
from vit_finetune.run import Finding, Run, RunError

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
    # Where groups are too large, the numbers are of what images count for, and not of all that have a label.
    large: list[str | None] = [f"g{number // 20}" for number in range(200)]
    source = drawn_source(labels, 4, group=large)
    carve(source, several("drawn", group="group"))
    assert "because some belong together: c" in source.notices[0]
    assert source.notices[0].endswith("(each image by the rarest of its labels)")


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
    assert not findings["no-label"].exclude and "data.exclude" not in findings["no-label"].advice
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


def test_labels_that_no_image_has(tmp_path: Path) -> None:
    rows = [{**row, "disc": 0, "bar": 0} for row in flag_rows(tmp_path / "photos", 20)]
    table = write_rows(tmp_path / "photos" / "table.csv", rows)
    assert found(table, label_column=list(SHAPES))["class-empty"].severity == "warning"
    # Of which a model would learn nothing.
    assert found(table, label_column=["disc", "bar"])["class-empty"].severity == "error"
    with pytest.raises(RunError, match="the data has no image of disc, bar"):
        prepare_splits(several(table, label_column=["disc", "bar"]))


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
