"""What a loopback Hub reads in a README.md."""

from __future__ import annotations

import re
from typing import Any

import yaml
from loopback_objects import HubError

LICENSES = (
    *("apache-2.0", "mit", "bsd-3-clause", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "mpl-2.0", "unlicense"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "odbl", "openrail", "unknown", "other"),
)
"""Identifiers that the Hub takes; it knows more."""


def check_card(content: str) -> dict[str, Any]:
    """The metadata at the head of a README.md; empty where there is none.

    Raises:
        HubError: there is some, and it is no YAML mapping, or names a license that the Hub does not know.
    """
    head = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", content, re.DOTALL)
    if not head:
        return {}
    try:
        found = yaml.safe_load(head[1])
    except yaml.YAMLError as error:
        raise HubError(400, f"Invalid metadata in README.md: {error}") from error
    if not isinstance(found, dict | None):
        raise HubError(400, "Invalid metadata in README.md: it is no mapping")
    licenses = (found or {}).get("license") or []
    for license in licenses if isinstance(licenses, list) else [licenses]:
        if license not in LICENSES:
            raise HubError(400, f'"license" must be one of [{", ".join(LICENSES)}]')
    return found or {}


def card_tags(card: dict[str, Any]) -> list[str]:
    """What the Hub makes of a card for people to search by."""

    def several(key: str) -> list[str]:
        value = card.get(key) or []
        return [str(one) for one in (value if isinstance(value, list) else [value])]

    tags = [*several("library_name"), *several("tags"), *several("pipeline_tag")]
    tags += ["model-index"] if "model-index" in card else []
    tags += [f"task_categories:{name}" for name in several("task_categories")]
    tags += [f"dataset:{name}" for name in several("datasets")]
    for name in several("base_model"):
        relation = card.get("base_model_relation", "finetune")
        tags += [f"base_model:{name}", f"base_model:{relation}:{name}"]
    tags += [f"license:{name}" for name in several("license")]
    return list(dict.fromkeys(tags))
