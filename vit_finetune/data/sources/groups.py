"""Which images belong to one group: by a column of the data, or by a pattern in their ids."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from vit_finetune.run import RunError


def group_names(where: str, values: Iterable[Any]) -> list[str | None]:
    """A column's values as names of groups; None where a row has none, that image stands alone.

    Raises:
        RunError: a value is no single one.
    """
    names: list[str | None] = []
    for value in values:
        if isinstance(value, list | dict | bytes):
            raise RunError(f"{where}: holds {type(value).__name__}; expected one group per image")
        names.append(None if value is None or value == "" else str(value))
    return names


def match_groups(where: str, ids: Sequence[str], pattern: str) -> list[str | None]:
    """What a regular expression finds in each id: its first parenthesis where it has one, else the match.

    None where it finds nothing or nothing but an empty text.

    Args:
        where: what holds the images, for messages.
        ids: of the images.
        pattern: the regular expression, searched for anywhere in the id.

    Raises:
        RunError: no regular expression.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise RunError(
            f"{where}: data.group={pattern} is neither a column of the data nor a regular expression: {error}"
        ) from error
    part = 1 if expression.groups else 0
    found = map(expression.search, ids)
    return [match[part] or None if match else None for match in found]
