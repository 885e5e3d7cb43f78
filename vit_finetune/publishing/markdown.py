"""Templates of cards: whatever is put into them is escaped, unless it is Markdown on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from vit_finetune.publishing.record import one_line
from vit_finetune.publishing.redaction import Markdown, escape_markdown, without_paths

TEMPLATES = Path(__file__).parent.parent / "templates"


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
