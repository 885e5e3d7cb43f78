"""What the pages for people are written with: HTML that is escaped, and holds nothing unprintable."""

from __future__ import annotations

from pathlib import Path

import jinja2

from vit_finetune.console import printable
from vit_finetune.publishing.record import duration, interval, memory, percent, pixels

TEMPLATES = Path(__file__).parent.parent / "templates"


def page_environment() -> jinja2.Environment:
    """The environment of all pages; text in it is escaped and printable, and numbers have one form."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters.update(
        percent=percent,
        interval=interval,
        duration=duration,
        memory=memory,
        pixels=pixels,
        number="{:,}".format,
    )
    return environment
