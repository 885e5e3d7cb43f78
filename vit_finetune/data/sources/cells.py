"""What cells say about an image that may have several labels: a list of names, or 0 and 1 by column."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets

from vit_finetune.run import RunError

FLAGS = {"0": False, "1": True, "false": False, "true": True}
"""What a cell of a column per label may hold, as text in lower case."""


def read_names(where: str, column: str, value: Any, feature: Any = None) -> list[str]:
    """The names in a cell that holds a list; of an empty list none.

    Args:
        where: the row, for messages.
        column: likewise.
        value: of the cell.
        feature: what the column knows of the values in its lists; a ClassLabel has their names.

    Raises:
        RunError: it holds no list, or something else than names and numbers in it.
    """
    if not isinstance(value, list):
        found = "nothing" if value is None else repr(value)
        raise RunError(
            f"{where}: {column} holds {found}; expected a list of names ([] for an image without a label), "
            f"because of data.multi_label. For one column per label, list them in data.label_column"
        )
    for name in value:
        if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
            raise RunError(f"{where}: {column} holds {name!r} in its list; expected names of labels")
    if isinstance(feature, datasets.ClassLabel):
        unknown = [number for number in value if not 0 <= number < len(feature.names)]
        if unknown:
            raise RunError(
                f"{where}: {column} holds {unknown[0]} in its list; expected ids of its {len(feature.names)} "
                f"classes"
            )
        value = [feature.names[number] for number in value]
    return list(dict.fromkeys(map(str, value)))


def read_flags(where: str, row: Mapping[str, Any], columns: Iterable[str]) -> list[str]:
    """The labels that a row with a column per label has: those whose cells hold 1 or true.

    Args:
        where: the row, for messages.
        row: its cells by column.
        columns: one per label.

    Raises:
        RunError: a cell holds something else than 0, 1, false or true.
    """
    names = []
    for column in columns:
        value = row.get(column)
        text = str(value).strip().lower().removesuffix(".0")  # numbers that went through floats
        if text not in FLAGS:
            found = "nothing" if value is None or value == "" else repr(value)
            raise RunError(f"{where}: {column} holds {found}; expected 0 or 1 (or false, true)")
        if FLAGS[text]:
            names.append(column)
    return names


def check_columns(where: object, columns: Sequence[str], asked: Iterable[str]) -> None:
    """Makes sure that every column that was asked for is there.

    Raises:
        RunError: one is not.
    """
    for column in asked:
        if column not in columns:
            raise RunError(
                f"{where}: there is no column {column!r}; found {', '.join(columns)}. Set data.label_column=…"
            )
