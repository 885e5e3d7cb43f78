"""The same training in worlds of different sizes: its recipe, a journal of what each step read, what must be equal."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import TINY_VIT, draw_folder, tiny_recipe
from fork_server import QUICK, Child, ForkServer
from safetensors.torch import load_file

from vit_finetune.run import Run

IMAGES, EPOCHS = 27, 3
"""Of training; steps of 8 leave 3, so that with four processes of two images some get none."""
HELD_OUT = 15
"""Of validation, and of test: neither 2 nor 4 processes can share them evenly, at any batch."""
PER_STEP, STEPS = 8, 12
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}

JOURNAL = """
import hashlib, json, os, pathlib
import torch
from vit_finetune import finetuning
from vit_finetune.training.trainer import ViTTrainer
plain_step, plain_metrics, batches = ViTTrainer.training_step, finetuning.validation_metrics, {}
journal = pathlib.Path("journal").open("a", buffering=1)
def step(self, model, inputs, *args, **kwargs):
    number = self.state.global_step
    batches[number] = batches.get(number, -1) + 1
    shown = [
        hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()[:16]
        for pixels, label in zip(inputs["pixel_values"], inputs["labels"].tolist()) if label != -100
    ]
    told = {"step": number, "batch": batches[number], "images": shown, "loss": loss_of(self, inputs)}
    print(json.dumps(told), file=journal)
    if (number, self.args.process_index) == (%d, %d) and batches[number] == 0:
        os.kill(os.getpid(), %d)
    return plain_step(self, model, inputs, *args, **kwargs)
@torch.no_grad()
def loss_of(self, inputs):
    inputs = self._prepare_inputs(inputs)
    logits = self.accelerator.unwrap_model(self.model)(pixel_values=inputs["pixel_values"]).logits
    return float(torch.nn.functional.cross_entropy(logits, inputs["labels"], label_smoothing=0.1, reduction="sum"))
def metrics(prediction):
    print(json.dumps({"evaluated": prediction.label_ids.tolist()}), file=journal)
    return plain_metrics(prediction)
ViTTrainer.training_step, finetuning.validation_metrics = step, metrics
"""
"""Source to run before: notes the pixels that each batch is made of, its loss, and which labels are evaluated.

It may also send the process a signal, in a step of a process: where `%d` stands.
"""


class Division(NamedTuple):
    """What the images of a step are divided over."""

    processes: int
    batch: int
    accumulation: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


class Signal(NamedTuple):
    """What a process sends itself, while it computes a step (counted from 0)."""

    number: int
    step: int
    rank: int


def journalled(signal: Signal | None = None) -> str:
    """Source to run before, for a journal and perhaps a signal."""
    return QUICK + JOURNAL % ((signal.step, signal.rank, signal.number) if signal else (-1, -1, 0))


def noted(child: Child) -> list[dict[str, Any]]:
    """What a process put into its journal."""
    return [json.loads(line) for line in (child.folder / "journal").read_text().splitlines()]


@dataclass
class Trained:
    """What one world, or several after another, did for one run."""

    run: Run
    sessions: list[list[Child]]

    def steps(self) -> dict[int, list[str]]:
        """The images of each step, in the order of the step's places; where it was made twice, the last time."""
        places: dict[int, dict[tuple[int, int], list[str]]] = {}
        for children in self.sessions:
            these: dict[int, dict[tuple[int, int], list[str]]] = {}
            for rank, child in enumerate(children):
                for entry in noted(child):
                    if "step" in entry:
                        these.setdefault(entry["step"], {})[entry["batch"], rank] = entry["images"]
            places |= these
        return {
            step: [image for place in sorted(found) for image in found[place]]
            for step, found in sorted(places.items())
        }

    def summed_losses(self) -> dict[int, float]:
        """The sum of the images' losses by step, as plain PyTorch gives it where there is no dropout."""
        sums: dict[int, float] = {}
        for entry in self.entries():
            if "step" in entry:
                sums[entry["step"]] = sums.get(entry["step"], 0.0) + entry["loss"]
        return sums

    def entries(self) -> list[dict[str, Any]]:
        """All that was noted."""
        return [entry for children in self.sessions for child in children for entry in noted(child)]

    def evaluated(self) -> list[list[int]]:
        """The labels that were evaluated, sorted, for each evaluation of each process."""
        return [sorted(entry["evaluated"]) for entry in self.entries() if "evaluated" in entry]

    def losses(self) -> dict[int, float]:
        """Training loss by step."""
        history = json.loads(self.run.history.read_text())
        return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}

    def evaluations(self) -> dict[int, tuple[float, float]]:
        """Loss and accuracy on the validation images by step."""
        history = json.loads(self.run.history.read_text())
        return {
            entry["step"]: (entry["eval_loss"], entry["eval_accuracy"])
            for entry in history
            if "eval_loss" in entry
        }


@dataclass
class Place:
    """Where the runs of a test are."""

    forks: ForkServer
    folder: Path
    photos: Path

    def start(
        self,
        name: str,
        division: Division,
        *words: str,
        dropout: bool = False,
        evaluation: int = 4,
        signal: Signal | None = None,
    ) -> tuple[Run, list[Child]]:
        """Starts the processes of a run, or, where it is there already, those that resume it."""
        run = Run(self.folder / name)
        recipe = self.write_recipe(run, division, dropout, evaluation)
        told = ["train", recipe, *words, *(["--resume"] if run.exists() else [])]
        folder = self.folder / f"{name}.session-{len(list(self.folder.glob(f'{name}.session-*')))}"
        cache, before = str(self.folder / "cache"), journalled(signal)
        if division.processes == 1:
            return run, [self.forks.start(folder, *told, before=before, VIT_FINETUNE_CACHE=cache)]
        children = self.forks.start_world(
            folder, division.processes, *told, before=before, VIT_FINETUNE_CACHE=cache
        )
        return run, children

    def write_recipe(self, run: Run, division: Division, dropout: bool, evaluation: int) -> Path:
        """A recipe file; without dropout nothing depends on how a step is divided."""
        recipe = build(self.photos, run.path, division, dropout, evaluation)
        file = self.folder / f"{run.path.name}.{len(list(self.folder.glob('*.yaml')))}.yaml"
        file.write_text(recipe.to_yaml(resolved=False), encoding="utf-8")
        return file


def build(photos: Path, output: Path, division: Division, dropout: bool = False, evaluation: int = 4) -> Any:
    """The recipe that all these runs carry out, divided in one way or another."""
    return tiny_recipe(
        photos,
        output,
        model={"config": {**TINY_VIT, **DROPOUT}, "drop_path_rate": 0.3} if dropout else {"config": TINY_VIT},
        augmentation={"crop_scale": [0.5, 1.0], "random_erasing": 0.3},  # each image stays one of its own
        training={
            **{f"{what}_strategy": "steps" for what in ("save", "eval")},
            **{f"{what}_steps": 2 for what in ("save", "eval")},
            "num_train_epochs": EPOCHS,
            "per_device_train_batch_size": division.batch,
            "gradient_accumulation_steps": division.accumulation,
            "label_smoothing_factor": 0.1,
            "logging_steps": 1,
            "dataloader_num_workers": 0,
            "metric_for_best_model": "loss",  # accuracies of so few images are equal too often
        },
        evaluation={"batch_size": evaluation},
    )


def draw_photos(root: Path) -> Path:
    """Images of which `IMAGES` are for training, and `HELD_OUT` each for validation and test."""
    return draw_folder(root, 3, (IMAGES + 2 * HELD_OUT) // 3)


def said(children: Sequence[Child]) -> str:
    """What processes said, for the message of a test that fails."""
    return "\n".join(f"--- process {rank}\n{child.stderr}" for rank, child in enumerate(children))


def finish(children: Sequence[Child]) -> str:
    """What the main process said; makes sure that all ended well, and that no other spoke."""
    assert [child.wait() for child in children] == [0] * len(children), said(children)
    for child in children[1:]:
        # torch's own, where an address has no name.
        spoken = [line for line in child.stderr.splitlines() if not re.match(r"\[W.*hostname", line)]
        assert not spoken, said(children)
    return children[0].stderr


def weights(run: Run) -> dict[str, torch.Tensor]:
    """A run's final weights, but for those that no output depends on.

    A key's bias adds the same to all that a softmax is taken of: its gradient is rounding, which Adam scales up.
    """
    loaded = load_file(run.model / "model.safetensors")
    return {name: value for name, value in loaded.items() if not re.search(r"(key|k_proj)\.bias$", name)}


def check_same(found: Trained, expected: Trained, tolerance: float = 1e-5) -> None:
    """Makes sure that two runs read the same, and had the same losses, evaluations, weights and reports."""
    assert found.losses() == pytest.approx(expected.losses(), abs=tolerance)

    check_same_results(found.run, expected.run, tolerance)
    assert found.evaluations().keys() == expected.evaluations().keys()
    for step, scores in expected.evaluations().items():
        assert found.evaluations()[step] == pytest.approx(scores, abs=tolerance)


def check_same_results(found: Run, expected: Run, tolerance: float = 1e-5) -> None:
    """Makes sure that two runs ended with the same weights and reports."""
    ours, theirs = weights(found), weights(expected)
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
    for split in ("validation", "test"):
        report, other = (json.loads(run.report(split).read_text()) for run in (found, expected))
        assert report["num_images"] == other["num_images"] == HELD_OUT
        assert report["confusion_matrix"] == other["confusion_matrix"]
        check_close(report, other, tolerance)


def check_close(one: Any, other: Any, tolerance: float, path: str = "report") -> None:
    """Makes sure that two JSON values are the same, numbers to a tolerance."""
    if isinstance(other, dict):
        assert one.keys() == other.keys(), path
        for key in other:
            check_close(one[key], other[key], tolerance, f"{path}.{key}")
    elif isinstance(other, list):
        assert len(one) == len(other), path
        for number, pair in enumerate(zip(one, other, strict=True)):
            check_close(*pair, tolerance, f"{path}[{number}]")
    elif isinstance(other, float):
        assert one == pytest.approx(other, abs=tolerance), path
    else:
        assert one == other, path
