"""A trained model to an ONNX file that is measured against it, with a script that uses it without torch."""

from __future__ import annotations

import io
import runpy
import shlex
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import BaseImageProcessor, PreTrainedModel

from vit_finetune.console import say, show_table, warn
from vit_finetune.data.transforms import check_image_processor, normalize
from vit_finetune.evaluation.images import spread_rows
from vit_finetune.evaluation.parity import (
    BATCH,
    CALIBRATED_ON,
    MODEL,
    Answers,
    ComparedImages,
    answer_all,
    calibration_batches,
    compare_answers,
    largest_difference,
    open_compared,
)
from vit_finetune.evaluation.scoring import probabilities_of, scoring_mode
from vit_finetune.evaluation.speed import repeat_in_turns
from vit_finetune.files import folder_written_whole, write_json
from vit_finetune.hub_repos import parse_hub_id
from vit_finetune.model.loading import load_checkpoint
from vit_finetune.model.processing import processor_size
from vit_finetune.publishing.comparison_page import rounded
from vit_finetune.publishing.export import (
    FLOAT_FILE,
    INT8_FILE,
    INT8_METHOD,
    OPSET,
    PACKAGES,
    SCRIPT,
    TOLERANCE,
    answer,
    check_packages,
    open_session,
    size_of,
    write_companions,
    write_int8,
    write_onnx,
)
from vit_finetune.publishing.record import interval, memory, percent
from vit_finetune.run import Run, RunError
from vit_finetune.training.hardware import describe_hardware

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

SCRIPT_IMAGES = 32
"""Images that the script is tried on."""
MOST_LEVELS = 2.5
"""Of 255, by which a pixel of the script may differ: torchvision rounds the weights of resizing to 16 bits,
Pillow to 22, in each of two directions."""
MOST_LOST = 0.01
"""Accuracy that int8 may cost before a warning says so."""


def export(
    target: str | Path, data: str | None = None, quantize: str | None = None, output: str | Path | None = None
) -> dict[str, Any]:
    """What `export.json` says of the ONNX files that were written beside it.

    Args:
        target: a run folder, a model folder or a Hub id.
        data: images to compare on, as in `data.path`; the run's test split if None, and of a model without
            a run random pixels.
        quantize: `int8` for a second file of 8-bit integers, calibrated on validation images.
        output: the folder to write; `<run>/onnx`, or `<name>-onnx` of a model, if None.

    Raises:
        RunError: the extra `onnx` is not installed; the folder is there already; no model there; torch cannot
            translate its architecture, or the file answers otherwise than the model; no images to calibrate
            on, or classes that are not the model's.
    """
    check_packages()
    run = Run(target)
    folder = _free_folder(run, str(target), output)
    model, image_processor = load_checkpoint(str(run.model if run.exists() else target))
    check_image_processor(image_processor)
    images = open_compared(str(target), data, model, image_processor, quantize is not None)
    size, threads = processor_size(image_processor), torch.get_num_threads()
    with folder_written_whole(folder) as made:
        say(f"{FLOAT_FILE}: {type(model).__name__}, {size[0]}×{size[1]} pixels, opset {OPSET}")
        write_onnx(model, size, made / FLOAT_FILE)
        write_companions(model, image_processor, made)
        sessions = {FLOAT_FILE: open_session(made / FLOAT_FILE, threads)}
        _check_batches(model, sessions[FLOAT_FILE], size)
        if images.calibration is not None:
            batches = calibration_batches(images.calibration, image_processor, f"{INT8_FILE}: calibrating")
            write_int8(made / FLOAT_FILE, made / INT8_FILE, batches)
            sessions[INT8_FILE] = open_session(made / INT8_FILE, threads)
        answers = _answers(model, sessions)
        logits = answer_all(answers, images, model, image_processor)
        compared = {
            name: compare_answers(model, logits[MODEL], found, images.labels)
            for name, found in logits.items()
        }
        _check_same(compared[FLOAT_FILE]["largest_difference"], f"{len(images.items)} images", model)
        script = runpy.run_path(str(made / SCRIPT))
        tried = _try_script(script, sessions[FLOAT_FILE], images, logits[MODEL], model, image_processor)
        speeds = _time(answers, model, size)
        models = {name: facts | {"images_per_second": speeds[name]} for name, facts in compared.items()}
        for name in sessions:
            models[name]["bytes"] = size_of(made / name)
        facts = _describe(model, size, images, threads) | {"models": models, "script": tried}
        write_json(made / "export.json", facts)
    _show(facts, folder)
    return facts


def _free_folder(run: Run, target: str, output: str | Path | None) -> Path:
    """The folder to write, which is not there yet, or empty and can be replaced."""
    if output is not None:
        folder = Path(output).expanduser()
    elif run.exists():
        folder = run.path / "onnx"
    else:
        path = Path(target).expanduser()
        named = None if path.is_dir() else parse_hub_id(target)
        folder = Path(f"{named[0].split('/')[-1] if named else path.resolve().name}-onnx")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise RunError(f"{folder} is there already. Remove it, or write to another folder with --output")
    folder = folder.resolve() if folder.is_symlink() else folder
    if folder.is_dir() and (folder.is_mount() or folder.samefile(Path.cwd())):
        raise RunError(
            f"{folder} cannot be written as a whole: a disk is mounted there, or you are in it. Write to a "
            f"new folder, such as --output {shlex.quote(str(folder / 'onnx'))}"
        )
    return folder


def _answers(model: PreTrainedModel, sessions: Mapping[str, InferenceSession]) -> Answers:
    """The model and its files, as what answers with logits."""

    def of_model(pixel_values: torch.Tensor) -> np.ndarray:
        logits: np.ndarray = model(pixel_values=pixel_values).logits.numpy()
        return logits

    def of_file(session: InferenceSession, pixel_values: torch.Tensor) -> np.ndarray:
        return answer(session, pixel_values.numpy())

    answers: dict[str, Callable[[torch.Tensor], np.ndarray]] = {MODEL: of_model}
    return answers | {name: partial(of_file, session) for name, session in sessions.items()}


def _check_batches(model: PreTrainedModel, session: InferenceSession, size: tuple[int, int]) -> None:
    """Raises RunError unless the file answers as the model does, for one image and for three."""
    generator = torch.Generator().manual_seed(0)
    answers = _answers(model, {FLOAT_FILE: session})
    for batch in (1, 3):
        pixel_values = torch.randn(batch, 3, *size, generator=generator)
        with scoring_mode(model):
            expected, found = (compute(pixel_values) for compute in answers.values())
        if found.shape != expected.shape:
            raise RunError(
                f"{model.config.model_type} models cannot be exported: of {batch} images the ONNX file makes "
                f"{found.shape[0]} answers. Nothing was written"
            )
        _check_same(largest_difference(model, expected, found), f"{batch} of random pixels", model)


def _check_same(difference: float, images: str, model: PreTrainedModel) -> None:
    if not difference <= TOLERANCE:  # NaN too
        raise RunError(
            f"{model.config.model_type} models cannot be exported: on {images} a probability of the file is "
            f"off by {difference:.1e}, and {TOLERANCE:.0e} is allowed. Nothing was written"
        )


def _try_script(
    script: Mapping[str, Any],
    session: InferenceSession,
    images: ComparedImages,
    expected: np.ndarray,
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
) -> dict[str, Any]:
    """How the script, from files of images to probabilities, differs from the model and its processor.

    Raises:
        RunError: the image processor does something that the script does not know of.
    """
    rows = spread_rows(len(expected), SCRIPT_IMAGES)
    ours = np.stack([script["read_pixels"](io.BytesIO(images.encoded(row))) for row in rows])
    theirs = torch.stack([images.items[row]["pixel_values"] for row in rows])
    prepared = normalize(theirs, image_processor).numpy()  # (images, 3, H, W), as ours
    level = image_processor.rescale_factor / np.reshape(image_processor.image_std, (3, 1, 1))  # 1 of 255
    levels = float((np.abs(ours - prepared) / level).max()) if ours.shape == prepared.shape else np.inf
    if not levels <= MOST_LEVELS:
        raise RunError(
            f"{SCRIPT} cannot prepare images as the model's {type(image_processor).__name__} does: pixels "
            f"are off by {levels:.0f} of 255. Expected one that fits images to a size, or their shorter "
            f"side and crops the middle, and normalises them. Nothing was written"
        )
    scored = probabilities_of(expected[rows], model)
    _check_same(
        float(np.abs(script["classify"](session, prepared) - scored).max()), f"{SCRIPT}'s images", model
    )
    difference = float(np.abs(script["classify"](session, ours) - scored).max())
    return {"num_images": len(rows), "largest_difference": difference, "pixel_levels": round(levels, 2)}


def _time(answers: Answers, model: PreTrainedModel, size: tuple[int, int]) -> dict[str, dict[str, float]]:
    """Images per second of all that answer, by name and batch size; from pixels to logits."""
    speeds: dict[str, dict[str, float]] = {name: {} for name in answers}
    for batch in (1, BATCH):
        pixel_values = torch.rand(batch, 3, *size)
        work = {name: partial(compute, pixel_values) for name, compute in answers.items()}
        with scoring_mode(model):
            rates = repeat_in_turns(work, f"timing, {batch} at a time")
        for name, rate in rates.items():
            speeds[name][str(batch)] = round(batch * rate, 2)
    return speeds


def _describe(
    model: PreTrainedModel, size: tuple[int, int], images: ComparedImages, threads: int
) -> dict[str, Any]:
    """What `export.json` says beside the comparison; no paths, for the folder is made to be given away."""
    calibration = images.calibration
    packages = ("torch", "transformers", *PACKAGES)
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "architecture": type(model).__name__,
        "image_size": list(size),
        "opset": OPSET,
        "compared_on": images.source,
        "num_images": len(images.items),
        "int8": {"method": INT8_METHOD, "calibration_images": min(CALIBRATED_ON, len(calibration))}
        if calibration is not None
        else None,
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in packages},
        "device": describe_hardware(use_cpu=True, processes=1)["device"],
        "threads": threads,
    }


def _show(facts: dict[str, Any], folder: Path) -> None:
    models = facts["models"]
    files = {name: found for name, found in models.items() if name != MODEL}
    score = next((name for name in ("accuracy", "exact_match") if name in models[MODEL]), None)
    rows = []
    if score:
        scores = [(found[score], found[f"{score}_interval"]) for found in models.values()]
        told = [f"{percent(value)}  [{interval(bounds)}]" for value, bounds in scores]
        rows.append([score.replace("_", " "), *told])
    rows += [
        ["a probability is off by", "", *(f"{found['largest_difference']:.0e}" for found in files.values())],
        ["other answers", "", *(f"{found['changed_predictions']:,}" for found in files.values())],
        ["size", "", *(memory(found["bytes"]) for found in files.values())],
    ]
    for batch in models[MODEL]["images_per_second"]:
        speeds = [rounded(found["images_per_second"][batch]) for found in models.values()]
        rows.append([f"images/s, {batch} at a time", *speeds])
    threads = "1 thread" if facts["threads"] == 1 else f"{facts['threads']} threads"
    title = f"{facts['num_images']:,} images: {facts['compared_on']}; {threads}"
    show_table(title, ["", *models], rows)
    if score is None:
        say("without images nothing is said about accuracy; say which with --data PATH")
    elif INT8_FILE in models and (lost := models[MODEL][score] - models[INT8_FILE][score]) > MOST_LOST:
        warn(f"int8 costs {100 * lost:.1f} points of {score.replace('_', ' ')} here")
    say(f"written: {folder}")
    say(f"next: python {shlex.quote(str(folder / SCRIPT))} {shlex.quote(str(folder / FLOAT_FILE))} IMAGE…")
