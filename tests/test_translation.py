"""README.zh.md says what README.md says: the same commands, tables, links, keys and figures in the same places."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = "English | 简体中文"
"""What each begins with, below its title; the other one is a link."""


def readme(name: str) -> str:
    text = (ROOT / name).read_text(encoding="utf-8")
    title, blank, languages, *rest = text.splitlines()
    assert title == "# vit-finetune" and not blank
    links = re.findall(r"\[[^]]+\]\(([^)]+)\)", languages)
    assert re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", languages) == LANGUAGES
    assert links == [{"README.md": "README.zh.md", "README.zh.md": "README.md"}[name]]
    return "\n".join(rest)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def code(text: str) -> list[tuple[str, list[str]]]:
    """Blocks of a language without their comments; of the others, which describe in words, the names of files."""
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if language:
            lines = [re.sub(r"(^|\s+)#.*", "", line).rstrip() for line in block.splitlines()]
        else:
            lines = re.findall(r"[\w.-]*\w(?:/|\.[a-z]+)", block, re.ASCII)
        found.append((language, lines))
    return found


def headings(text: str) -> list[str]:
    return re.findall(r"^#+(?= )", prose(text), re.MULTILINE)


def items(text: str) -> int:
    return len(re.findall(r"^- ", prose(text), re.MULTILINE))


def first_columns(text: str) -> list[str]:
    return re.findall(r"^\| *((?:[^|\\]|\\.)*?) *\|", prose(text), re.MULTILINE)


def targets(text: str) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", prose(text))


def keys(text: str) -> Counter[str]:
    """Inline code; another language may name it in another order, or another line."""
    return Counter(re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", prose(text)))


def figures(text: str) -> Counter[str]:
    """The numbers of the prose, such as 0.986; those up to twelve may be words."""
    spoken = re.sub(r"`[^`]+`|\]\([^)]+\)", "", prose(text))
    return Counter(n for n in re.findall(r"\d+(?:[.,]\d+)*", spoken) if "." in n or int(n) > 12)


@pytest.mark.parametrize("part", [code, headings, items, first_columns, targets, keys, figures])
def test_both_readmes_have_the_same(part: Callable[[str], object]) -> None:
    english = part(readme("README.md"))
    assert english, "there is nothing to compare"
    assert part(readme("README.zh.md")) == english


def test_the_other_one_is_in_chinese() -> None:
    """No paragraph was left as it was: of what is said in words, most characters are Chinese."""
    text = re.sub(r"`[^`]+`|\[[^]]+\]\([^)]+\)", "", prose(readme("README.zh.md")))
    paragraphs = [line for line in text.splitlines() if len(re.findall(r"[a-z]{2,}", line)) > 6]
    assert not [line for line in paragraphs if len(re.findall(r"[\u4e00-\u9fff]", line)) < 10]
