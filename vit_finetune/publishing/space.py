"""The files of a Space: the demo's own page, for one model of the Hub."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from vit_finetune.hub_repos import web_address
from vit_finetune.publishing.hub import OURS
from vit_finetune.publishing.markdown import join_card

PACKAGE = Path(__file__).parent.parent
SOURCES = {
    "app.py": "demo.py",
    "gate.py": "gate.py",
    "images.py": "data/images.py",
    "attention.py": "evaluation/attention.py",
}
"""Files of the Space that are files of this package."""
IMPORTS = {
    "from vit_finetune.data.images import": "from images import",
    "from vit_finetune.gate import": "from gate import",
    "from vit_finetune.evaluation.attention import": "from attention import",
}
"""All that is different in them."""
REQUIRED = [
    *("gradio", "torch", "torchvision", "transformers", "huggingface-hub", "safetensors"),
    *("captum", "matplotlib", "numpy", "pillow", "simplejpeg"),
]
"""Distributions that they need."""
LONGEST_TITLE = 60


@dataclass(frozen=True)
class Published:
    """A model on the Hub, at one commit."""

    repo_id: str
    commit: str
    license: str | None = None


def build_space(space: str, model: Published) -> dict[str, Path | bytes]:
    """The files of a Space by path: the page, its requirements and its README.md.

    Args:
        space: the Space's `owner/name`.
        model: which one it shows; the Space goes on with this commit when others are pushed.
    """
    files = {name: _source(place) for name, place in SOURCES.items()}
    files["app.py"] += _start(model)
    files["requirements.txt"] = "".join(f"{name}=={_public_version(name)}\n" for name in REQUIRED)
    files["README.md"] = _card(space, model)
    return {name: text.encode() for name, text in files.items()}


def _source(place: str) -> str:
    text = (PACKAGE / place).read_text(encoding="utf-8")
    for ours, local in IMPORTS.items():
        text = text.replace(ours, local)
    return text


def _start(model: Published) -> str:
    """What follows the page's own source: it is opened with this model."""
    return f"""

# --------------------------------------------------------------------------- this Space

if __name__ == "__main__":
    import threading

    from transformers import AutoImageProcessor, AutoModelForImageClassification

    MODEL, COMMIT = {model.repo_id!r}, {model.commit!r}
    # A private model is read with the Space's secret HF_TOKEN.
    published = AutoModelForImageClassification.from_pretrained(
        MODEL, revision=COMMIT, use_safetensors=True, dtype=torch.float32
    )
    if torch.accelerator.is_available():
        published = published.to(torch.accelerator.current_accelerator())
    processor = AutoImageProcessor.from_pretrained(MODEL, revision=COMMIT)
    open_page(build_page(MODEL, published.eval(), processor))
    threading.Event().wait()
"""


def _public_version(name: str) -> str:
    """The version that is installed here, without what says for which machine it was built."""
    return version(name).partition("+")[0]


def _card(space: str, model: Published) -> str:
    front = {
        "title": space.partition("/")[2][:LONGEST_TITLE],
        "emoji": "🔍",
        "colorFrom": "blue",
        "colorTo": "green",
        "sdk": "gradio",
        "sdk_version": _public_version("gradio"),
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "app_file": "app.py",
        "models": [model.repo_id],
        "tags": [OURS, "image-classification"],
    }
    if model.license is not None:
        front["license"] = model.license
    text = (
        f"\n# {model.repo_id}\n\n"
        f"Drop an image: this page shows what [{model.repo_id}]({web_address(model.repo_id)}) takes "
        f"it for, and where it looked.\nIt runs the commit `{model.commit}`; no images of the training data "
        f"are part of it.\n\n"
        f"`app.py` and the files beside it were written by `vit-finetune demo --space` and need "
        f"nothing of\nthat package. A private model needs a secret `HF_TOKEN` in the settings.\n"
    )
    return join_card(front, text)
