"""checkup.html: what is wrong with the data, with the pictures; needs no network and no JavaScript."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

from vit_finetune.files import write_text
from vit_finetune.publishing.page import page_environment
from vit_finetune.publishing.picture import Picture, build_picture
from vit_finetune.run import Finding, Findings, FoundImage

MOST_SHOWN = 48
"""Images that the page shows of one finding; findings.json lists all."""

Pictures = Mapping[tuple[str, str], bytes]
"""Encoded pictures by split and id."""


def shown_images(document: Findings) -> list[FoundImage]:
    """The images whose pictures the page shows."""
    return [image for finding in document.findings for image in finding.images[:MOST_SHOWN]]


def write_checkup(document: Findings, pictures: Pictures, folder: Path) -> Path:
    """The path of `checkup.html` in the folder, beside `findings.json`; each written whole or not at all.

    Args:
        document: what was found.
        pictures: of `shown_images`; images without one are named only.
        folder: made if need be; only these two files in it are replaced.
    """
    write_text(folder / "findings.json", document.to_json())
    page = folder / "checkup.html"
    write_text(page, build_page(document, pictures))
    return page


def build_page(document: Findings, pictures: Pictures) -> str:
    """The page as HTML."""
    environment = page_environment()
    environment.filters["number"] = "{:,}".format
    return environment.get_template("checkup.html.jinja").render(
        document=document,
        sections=[(finding, _sets(finding, pictures)) for finding in document.findings],
        severities=("error", "warning", "note"),
        most_shown=MOST_SHOWN,
    )


def _sets(finding: Finding, pictures: Pictures) -> list[list[tuple[FoundImage, Picture | None]]]:
    """The images to show, those that belong together side by side."""
    shown = finding.images[:MOST_SHOWN]
    return [
        [(image, build_picture(pictures.get((image.split, image.id), b""))) for image in members]
        for _, members in itertools.groupby(shown, key=lambda image: image.group)
    ]
