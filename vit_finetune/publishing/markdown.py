"""Templates of cards: whatever is put into them is escaped, unless it is Markdown on purpose."""

from __future__ import annotations

import re
from typing import Any

import jinja2
import yaml

from vit_finetune.publishing.page import TEMPLATES
from vit_finetune.publishing.record import one_line
from vit_finetune.publishing.redaction import Markdown, escape_markdown, without_paths
from vit_finetune.run import RunError

MOST_NAMED = 5
"""Images that a card names of each finding; their number stands in its sentence."""
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\n(.*?\n|)---[ \t]*(?:\n(.*)|)", re.DOTALL)


def build_environment() -> jinja2.Environment:
    """Reads templates of Markdown; filters `number` (with thousands) and `public` (without paths)."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=False,  # `finalize` escapes whatever is not Markdown on purpose
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_finalize,
    )
    environment.filters["number"] = "{:,}".format
    environment.filters["public"] = lambda text: without_paths(one_line(str(text)))
    environment.globals["Markdown"] = Markdown
    return environment


def _finalize(value: Any) -> Any:
    return escape_markdown(value) if isinstance(value, str) and not isinstance(value, Markdown) else value


def read_card(card: str, name: str = "README.md") -> tuple[dict[str, Any], str]:
    """The front matter of a card, empty where there is none, its tags as a list of words, and the text below.

    Raises:
        RunError: the front matter is no YAML mapping; `name` says whose.
    """
    parts = _FRONT_MATTER.fullmatch(card)
    try:
        front = (yaml.safe_load(parts[1]) if parts else None) or {}
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{name}: cannot be read: {reason}. Mend it, or remove the file") from None
    if not isinstance(front, dict):
        raise RunError(f"{name}: its front matter is no mapping (`key: value`). Mend it, or remove the file")
    if tags := front.get("tags"):
        front["tags"] = [str(tag) for tag in tags] if isinstance(tags, list) else [str(tags)]
    return front, (parts[2] or "") if parts else f"\n{card}"


def join_card(front: dict[str, Any], text: str) -> str:
    """The card with this front matter above this text."""
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n{text}"


def join_tags(*fronts: dict[str, Any]) -> list[str]:
    """The tags of all front matters, each once."""
    return list(dict.fromkeys(tag for front in fronts for tag in front.get("tags") or []))
