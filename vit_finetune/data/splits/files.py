"""Which image went where, written beside a run and read back to repeat it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from vit_finetune.data.sources.columns import Source, column_array, column_values
from vit_finetune.data.sources.folders import ALL, SPLIT_NAMES, count_of, first_of
from vit_finetune.data.sources.labels import is_multi_label, label_texts, list_text
from vit_finetune.files import write_text
from vit_finetune.recipe import DataConfig
from vit_finetune.run import Run, RunError

COLUMNS = ("id", "label", "split")


def save_splits(splits: datasets.DatasetDict, run: Run) -> None:
    """Writes which image went where: `splits/<split>.csv`, columns id, label, split, and group if any.

    Several labels are a JSON list of names.
    """
    for name, split in splits.items():
        columns = [column_values(split, "id"), label_texts(split).to_pylist(), [name] * len(split)]
        heads = list(COLUMNS)
        if "group" in split.column_names:
            heads.append("group")
            columns.append(column_values(split, "group"))
        text = io.StringIO(newline="")
        # By itself the writer does not quote the other sign for a new line.
        odd = any("\r" in name for name in columns[0])
        writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL if odd else csv.QUOTE_MINIMAL)
        writer.writerow(heads)
        writer.writerows(zip(*columns))
        write_text(run.splits / f"{name}.csv", text.getvalue())


def read_splits(path: Path) -> pa.Table:
    """Which image goes where: string columns id, label and split, each id once.

    Args:
        path: a run, its `splits/` folder, or one csv file.

    Raises:
        RunError: nothing there, not such a table, a split of another name, or an image that is named twice.
    """
    folder = Run(path).splits if Run(path).splits.is_dir() else path
    files = sorted(folder.glob("*.csv")) if folder.is_dir() else [path]
    if not files or not files[0].is_file():
        raise RunError(
            f"data.splits={path}: found no splits there; expected a run, its splits/ folder, or a csv file "
            f"with the columns {', '.join(COLUMNS)}"
        )
    return pa.concat_tables([_read_file(file) for file in files])


def _read_file(file: Path) -> pa.Table:
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            heads = next(csv.reader(lines), [])
        if set(COLUMNS) - set(heads):
            found = ", ".join(heads)
            raise RunError(f"{file}: found the columns {found}; expected {', '.join(COLUMNS)}")
        table = pyarrow.csv.read_csv(
            file,
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(
                # Others, such as group, would have their type guessed from their first megabyte.
                include_columns=list(COLUMNS),
                column_types=dict.fromkeys(COLUMNS, pa.string()),
            ),
        )
    except (ValueError, csv.Error, pa.ArrowException, OSError) as error:
        raise RunError(f"{file}: not a readable table: {error}") from error
    names = table["split"].unique().to_pylist()
    unknown = [name for name in names if name.lower() not in SPLIT_NAMES]
    if unknown:
        raise RunError(f"{file}: found the split {unknown[0]!r}; expected train, validation or test")
    ours = pa.array([SPLIT_NAMES[name.lower()] for name in names], pa.string())
    split = ours.take(pc.index_in(table["split"], value_set=pa.array(names, pa.string())).combine_chunks())
    return pa.table({"id": table["id"], "label": table["label"], "split": split})


def repeat_splits(source: Source, config: DataConfig) -> datasets.DatasetDict:
    """Exactly the splits that `data.splits` names, whichever the source has, in the order of the source.

    Of the images that it names, those that the source has left out stay so.

    Args:
        source: the images; what is left out is added to its notices.
        config: the data and the splits to repeat.

    Raises:
        RunError: images that are not there, have another label or are named twice, or nothing to train or
            validate on.
    """
    assert config.splits is not None
    where = f"data.splits={config.splits}"
    table = read_splits(Path(config.splits).expanduser())
    wanted = {
        split: table.filter(pc.equal(table["split"], split))
        for split in ("train", "validation", "test")
        if split in table["split"].unique().to_pylist()
    }
    absent = [split for split in ("train", "validation") if split not in wanted]
    if absent:
        raise RunError(f"{where}: names no images for {' and '.join(absent)}; expected some")
    pools, pool_of = _find_pools(source, wanted)
    used = {name: np.zeros(len(pool), dtype=np.int64) for name, pool in pools.items()}
    splits, missing, relabelled = {}, [], []
    for split, rows in wanted.items():
        pool = pools[pool_of[split]]
        found = pc.index_in(rows["id"], value_set=column_array(pool, "id").combine_chunks())
        here = found.is_valid().to_numpy()
        left_out = _left_out(source, pool_of[split])
        missing += [name for name in rows["id"].filter(pa.array(~here)).to_pylist() if name not in left_out]
        numbers = found.drop_null().to_numpy().astype(np.int64)
        relabelled += _find_relabelled(rows.filter(pa.array(here)), pool, numbers)
        np.add.at(used[pool_of[split]], numbers, 1)
        splits[split] = pool.select(np.sort(numbers))
    _check_found(where, config.path, table, missing, relabelled)
    _check_once(where, pools, used)
    empty = [split for split, rows in splits.items() if not len(rows)]
    if empty:
        raise RunError(f"{where}: all images of {' and '.join(empty)} are excluded or cannot be read")
    left = [column_array(pool, "id").filter(pa.array(used[name] == 0)) for name, pool in pools.items()]
    names = [identity for ids in left for identity in ids.to_pylist()]
    if names:
        source.notices.append(
            f"{count_of(len(names), 'image')} that {where} does not name left out: {first_of(names)}"
        )
    return datasets.DatasetDict(splits)


def _find_pools(
    source: Source, wanted: Mapping[str, pa.Table]
) -> tuple[dict[str, datasets.Dataset], dict[str, str]]:
    """Where to look for images: all together, or by the source's splits where these count their rows anew."""
    everyone = datasets.concatenate_datasets(list(source.splits.values()))
    left_out = [pa.array(ids, pa.string()) for ids in source.left_out.values()]
    ids = pa.chunked_array([*column_array(everyone, "id").chunks, *left_out], pa.string())
    if len(ids.unique()) == len(ids):
        return {ALL: everyone}, dict.fromkeys(wanted, ALL)
    # Ids of a Hub dataset are row numbers. A split that it lacks was carved from its training images.
    first = "train" if "train" in source.splits else next(iter(source.splits))
    return dict(source.splits), {split: split if split in source.splits else first for split in wanted}


def _left_out(source: Source, pool: str) -> set[str]:
    return {name for split, ids in source.left_out.items() if pool in (ALL, split) for name in ids}


def _find_relabelled(rows: pa.Table, pool: datasets.Dataset, numbers: npt.NDArray[np.int64]) -> list[str]:
    """A text for each image whose class is not the one that its row names."""
    found = label_texts(pool).take(pa.array(numbers))
    named = rows["label"].combine_chunks()
    if is_multi_label(pool):
        named = pa.array([_sorted_list(text) for text in named.to_pylist()], pa.string())
    other = rows.append_column("found", found).filter(pc.not_equal(named, found))
    return [f"{row['id']} ({row['found']}, there {row['label']})" for row in other.to_pylist()]


def _sorted_list(text: str) -> str:
    """A JSON list of names as we write it; a text that is none, as it is."""
    try:
        names = json.loads(text)
    except ValueError:
        return text
    return list_text(map(str, names)) if isinstance(names, list) else text


def _check_found(where: str, path: str, table: pa.Table, missing: list[str], relabelled: list[str]) -> None:
    if missing:
        raise RunError(
            f"{where}: {len(missing):,} of {count_of(len(table), 'image')} that it names are not in {path}: "
            f"{first_of(missing, 5)}. Bring them back, or carve anew without data.splits"
        )
    if relabelled:
        raise RunError(
            f"{where}: {len(relabelled):,} of {count_of(len(table), 'image')} have another label in {path}: "
            f"{first_of(relabelled, 5)}. Correct one of the two, or carve anew without data.splits"
        )


def _check_once(
    where: str, pools: Mapping[str, datasets.Dataset], used: Mapping[str, npt.NDArray[np.int64]]
) -> None:
    for name, pool in pools.items():
        twice = column_array(pool, "id").filter(pa.array(used[name] > 1)).to_pylist()
        if twice:
            raise RunError(
                f"{where}: names {first_of(twice)} more than once; expected each image in one split"
            )
