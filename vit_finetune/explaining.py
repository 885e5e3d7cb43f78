"""The story of `explain`: images → where a model looks in them, as pictures in a folder."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel

from vit_finetune.console import progress, say
from vit_finetune.evaluation.attention import NoMap, overlay
from vit_finetune.evaluation.multi_label import read_thresholds
from vit_finetune.evaluation.prediction import FileImages, find_images
from vit_finetune.evaluation.scoring import predict_logits, probabilities_of
from vit_finetune.evaluation.seeing import Look, as_seen, describe_seeing, look_at
from vit_finetune.evaluation.target import best_device
from vit_finetune.files import write_json, written_whole
from vit_finetune.model.loading import is_multi_label, load_checkpoint
from vit_finetune.publishing.charts import save_distances
from vit_finetune.publishing.sheets import ROWS, Row, save_heads, save_sheet
from vit_finetune.run import Run, RunError

DOCUMENT = "explanations.json"
"""What was made of which image; a folder with it is ours to write to again."""
CHART = "attention-distance.png"
OURS = re.compile(r"(overlays|heads)/[^/\\]+\.png|sheet-\d+\.png|attention-distance\.png")
"""What we name pictures: only these of an old document are removed."""
LONGEST_STEM = 50
"""Characters of an image's name that its pictures keep: of four bytes each they are still a file name."""


def explain(
    target: str | Path, images: Sequence[str | Path], output: str | Path | None = None
) -> dict[str, Any]:
    """Where a model looks in images, written as pictures; answers what `explanations.json` says of them.

    Of each image `overlays/<name>.png`, and of a model with global attention `heads/<name>.png`: the heads of
    its last layer. `sheet-1.png` and so on show the images beside their maps; `attention-distance.png` says
    how far each head of each layer looks, over these images.

    Args:
        target: a run folder, a model folder or a Hub id.
        images: image files, and folders whose image files are taken, however deep.
        output: the folder to write to: new, empty, or of an earlier call, whose pictures are replaced;
            `explanations/` in the run, or here for a model, if None.

    Returns:
        `model`; `method` and the distances, as `describe_seeing` has them; `sheets`; and of each of the
        `images`: `path`, `label` and `probability` of the most probable class, `overlay`, and where there are
        heads `heads`. Pictures are named from the folder on.

    Raises:
        RunError: no model there, an image that is missing or cannot be read, a folder that holds something
            else, or a model that no method explains.
    """
    run = Run(target)
    folder = Path(output).expanduser() if output else (run.path if run.exists() else Path()) / "explanations"
    before = _pictures_before(folder)
    ours = folder.resolve()
    paths = [path for path in find_images(images) if ours not in path.resolve().parents]
    if not paths:
        raise RunError(f"these images are the explanations in {folder} themselves; name others")
    model, image_processor = load_checkpoint(str(run.model if run.exists() else target))
    model = model.to(best_device())
    files = FileImages(paths, image_processor)
    # Reads every image: one that cannot be read stops it before anything is written.
    logits = predict_logits(model, image_processor, files, 32, "predicting")
    rows = torch.from_numpy(probabilities_of(logits, model))
    for picture in before:
        (folder / picture).unlink(missing_ok=True)
    book = _Book(folder, unique_names(paths, _stems_in(folder)))
    book.begin()
    distances, size = [], (0, 0)
    with progress("explaining", len(paths), "images") as advance:
        for number, path in enumerate(paths):
            seen = files.read(number)
            best = int(rows[number].argmax())
            try:
                look = look_at(model, image_processor, seen, best)
            except NoMap as error:
                raise RunError(
                    f"{target}: {error}; expected a model with attention, or larger images"
                ) from None
            if look.distances is not None:
                distances.append(look.distances)
            size = (seen.shape[-2], seen.shape[-1])
            facts = {"label": model.config.id2label[best], "probability": float(rows[number, best])}
            title = f"{_say_classes(model, rows[number])} · {path.name}"
            written = str(path).encode("utf-8", "replace").decode()  # a name in another encoding is no JSON
            book.add({"path": written, **facts}, title, as_seen(seen), look)
            advance()
    return book.close({"model": str(target), **describe_seeing(model, distances, size)})


class _Book:
    """The pictures of the images so far, in a folder.

    Args:
        folder: to write to.
        names: what the pictures of each image are called.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, names
        self.entries: list[dict[str, Any]] = []
        self.sheets: list[str] = []
        self.rows: list[Row] = []
        self.columns: list[str] = []

    def begin(self) -> None:
        """Writes which pictures will come: the next call knows them for ours where this one is stopped."""
        planned = [{"overlay": f"overlays/{name}.png", "heads": f"heads/{name}.png"} for name in self.names]
        sheets = [f"sheet-{number + 1}.png" for number in range(-(-len(planned) // ROWS))]
        write_json(self.folder / DOCUMENT, {"sheets": sheets, "images": planned})

    def add(self, entry: dict[str, Any], title: str, image: Image.Image, look: Look) -> None:
        """Writes the pictures of one image, and the sheet that it fills."""
        name = f"{self.names[len(self.entries)]}.png"
        heat = overlay(image, look.map)
        entry["overlay"] = f"overlays/{name}"
        with written_whole(self.folder / entry["overlay"]) as temporary:
            heat.save(temporary, "PNG")
        self.columns, pictures = ["as the model sees it", look.method], [image, heat]
        if look.heads is not None:
            entry["heads"] = f"heads/{name}"
            heads = [overlay(image, head) for head in look.heads]
            save_heads(title, heads, self.folder / entry["heads"])
            self.columns.append("last layer, mean of its heads")
            pictures.append(overlay(image, look.heads.mean(dim=0)))
        self.entries.append(entry)
        self.rows.append(Row(title, pictures))
        if len(self.rows) == ROWS:
            self._write_sheet()

    def _write_sheet(self) -> None:
        self.sheets.append(f"sheet-{len(self.sheets) + 1}.png")
        save_sheet(self.rows, self.columns, self.folder / self.sheets[-1])
        self.rows = []

    def close(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Writes what is left, and the document; says what there is; answers the document."""
        if self.rows:
            self._write_sheet()
        document = facts | {"sheets": self.sheets, "images": self.entries}
        count = len(self.entries)
        say(f"{count:,} image{'s' if count != 1 else ''} explained by {facts['method']}, in {self.folder}:")
        say(f"  {', '.join(self.sheets)}: beside {'their maps' if count != 1 else 'its map'}")
        say("  overlays/: each map over its image")
        if "mean_attention_distance" in facts:
            save_distances(facts, self.folder / CHART)
            document["attention_distance"] = CHART
            say("  heads/: what each head of the last layer attends to")
            say(f"  {CHART}: how far each head of each layer looks")
        write_json(self.folder / DOCUMENT, document)
        return document


def unique_names(paths: Iterable[Path], taken: Iterable[str] = ()) -> list[str]:
    """A name for the pictures of each image: of its own, with nothing that a file system or shell minds.

    Args:
        paths: of the images.
        taken: names that others have.
    """
    used = {name.casefold() for name in taken}  # some file systems do not tell upper from lower case
    names = []
    for path in paths:
        stem = unicodedata.normalize("NFC", path.stem)
        safe = re.sub(r"[^\w.-]+", "_", stem)[:LONGEST_STEM].strip("._-") or "image"
        name, number = safe, 1
        while name.casefold() in used:
            number += 1
            name = f"{safe}-{number}"
        used.add(name.casefold())
        names.append(name)
    return names


def _pictures_before(folder: Path) -> list[str]:
    """The pictures that an earlier call left in a folder.

    Raises:
        RunError: the folder holds something, and no explanations.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; expected a folder for the explanations: name one with --output")
    if not folder.exists() or not any(folder.iterdir()):
        return []
    try:
        document = json.loads((folder / DOCUMENT).read_text(encoding="utf-8"))
        pictures = [*document["sheets"], document.get("attention_distance")]
        pictures += [image.get(kind) for image in document["images"] for kind in ("overlay", "heads")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise RunError(
            f"{folder} holds no explanations ({DOCUMENT}), but something else, which stays; write to another "
            f"folder with --output"
        ) from None
    return [picture for picture in pictures if isinstance(picture, str) and OURS.fullmatch(picture)]


def _stems_in(folder: Path) -> set[str]:
    return {path.stem for kind in ("overlays", "heads") for path in (folder / kind).glob("*")}


def _say_classes(model: PreTrainedModel, probabilities: torch.Tensor) -> str:
    """What an image is taken for, with probabilities; of several labels those that reach their thresholds."""
    names = model.config.id2label
    best = int(probabilities.argmax())
    said = [best]
    if is_multi_label(model):
        reached = probabilities.double() >= torch.from_numpy(read_thresholds(model.config))
        said = reached.nonzero().flatten().tolist()
    classes = ", ".join(f"{names[number]} {probabilities[number]:.1%}" for number in said)
    return classes or f"no label ({names[best]} {probabilities[best]:.1%})"
