"""What may leave the machine: text without its folders, and without what Markdown or HTML would act on."""

from __future__ import annotations

import re
from typing import Any

from vit_finetune.console import printable
from vit_finetune.publishing.record import one_line

_START = (
    r"(?:(?:file|ssh|sftp|smb|nfs)://"  # an address of a file
    r"|[\w.-]+@[\w.-]+:"  # user@host:
    r"|[A-Za-z]:[\\/](?!/)"  # C:\  (and not https://)
    r"|\\\\(?=\w)"  # \\host\share
    r"|~[\w.-]*[\\/]"  # ~/ and ~user/
    r"|\.\.[\\/]"  # ../ shows what lies around the working folder
    r"|/(?=[^/\s]))"
)
_PATH = re.compile(r"(?:^|(?<=[\s=\"'`(\[{,;|:>])|(?<=\s-[A-Za-z]))" + _START + r"[^\s\"'`,;|<>]*")
_QUOTED = re.compile(r"'[^'\n]*'|\"[^\"\n]*\"")
_WHOLE = re.compile(rf"((?:[\w.-]+=)?)({_START}.*)", re.DOTALL)
_HOME = re.compile(
    r"(?:/(?:home|Users)/[^/]+|/root|[A-Za-z]:[\\/]Users[\\/][^\\/]+|~[\w.-]*)[\\/]*", re.IGNORECASE
)


def without_paths(text: str) -> str:
    r"""The text with each path of the file system reduced to its last component; home folders become `~`.

    Relative paths below the working folder, Hub ids and web addresses stay. In quotes a path may hold spaces.

    >>> without_paths("train recipes/digits.yaml data.path=/home/ann/photos model.path=google/vit-base")
    'train recipes/digits.yaml data.path=photos model.path=google/vit-base'
    """
    parts, end = [], 0
    for quoted in _QUOTED.finditer(text):
        parts.append(_PATH.sub(_shortened, text[end : quoted.start()]))
        mark, inner = quoted[0][0], quoted[0][1:-1]
        parts.append(mark + _without_path(inner) + mark)
        end = quoted.end()
    # Joined and read once more: a lone apostrophe may have hidden the start of a path from the first reading.
    return _PATH.sub(_shortened, "".join([*parts, text[end:]]))


def values_without_paths(value: Any) -> Any:
    """A recipe's values, keys and all, with each path reduced to its last component."""
    match value:
        case dict():
            return {values_without_paths(key): values_without_paths(item) for key, item in value.items()}
        case list() | tuple():
            return [values_without_paths(item) for item in value]
        case str():
            return _without_path(value)
    return value


def _without_path(text: str) -> str:
    """`text` read as one value, perhaps with its key (`data.path=/a/my photos`), or else as prose."""
    whole = _WHOLE.fullmatch(text)
    return whole[1] + _last_component(whole[2]) if whole else _PATH.sub(_shortened, text)


def _shortened(match: re.Match[str]) -> str:
    return _last_component(match[0])


def _last_component(path: str) -> str:
    # Who and where go first: an address's `user@host`, `\\\\host`.
    path = re.sub(r"^(?:file://|\w+://[^/]*|[\w.-]+@[\w.-]+:|\\\\[^\\]*)", "", path)
    if _HOME.fullmatch(path):
        return "~"
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1] or "…"


# --------------------------------------------------------------------------- Markdown


class Markdown(str):
    """Text that is Markdown on purpose; every other string in a card is escaped."""


_ENTITIES = {
    "&": "&amp;",
    "<": "&lt;",
    ">": "&gt;",
    "|": "&#124;",
    "`": "&#96;",
    "\\": "&#92;",
    "$": "&#36;",
    "@": "&#64;",
}
_ACTIVE = re.compile(
    r"[&<>|`\\$@]|[*_~\[\]!]|(?<=http)s?:|(?<=www)\.|^(?:[#+=-]|\d+[.)](?=\s|$))", re.IGNORECASE
)


def escape_markdown(text: str) -> Markdown:
    """The text as it stands, on one line: nothing in it is markup, ends a table's cell or becomes a link."""
    return Markdown(_ACTIVE.sub(_escaped, one_line(text)))


def _escaped(match: re.Match[str]) -> str:
    before, last = match[0][:-1], match[0][-1]
    return before + _ENTITIES.get(last, f"\\{last}" if last not in ":." else f"&#{ord(last)};")


def fenced(text: str, language: str = "") -> Markdown:
    """The text as a code block whose fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markdown(f"{fence}{language}\n{printable(text).rstrip()}\n{fence}")
