"""Streamed training: resumed = uninterrupted, one process = two, and memory that does not grow with the data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import TINY_VIT, tiny_recipe
from exactness import AUGMENTED, DROPOUT, KillAt, Killed, same, weights_of
from fork_server import ForkServer
from safetensors.torch import load_file
from shard_files import NAMES, draw_png, sample, write_tar, write_tars
from worlds import finish

from vit_finetune.checking import check
from vit_finetune.data.streaming.prepared import PreparedStream, prepare_data
from vit_finetune.data.transforms import EvaluationImages
from vit_finetune.evaluation.scoring import evaluate
from vit_finetune.finetuning import finetune
from vit_finetune.model.loading import load_model
from vit_finetune.recipe import Recipe
from vit_finetune.run import Run, RunError
from vit_finetune.training.arguments import build_arguments
from vit_finetune.training.hardware import choose_hardware
from vit_finetune.training.images import build_batches, first_images, keep_workers
from vit_finetune.training.loading import choose_loading
from vit_finetune.training.trainer import ViTTrainer
from vit_finetune.training.world import World

STREAMED = {"streaming": True, "shuffle_buffer": 6}


def split_shards(folder: Path, train: list[int]) -> Path:
    """Shards of all three splits."""
    write_tars(folder, train, "train")
    write_tars(folder, [6], "val", sum(train))
    write_tars(folder, [7], "test", sum(train) + 6)
    return folder


def build_trainer(recipe: Recipe, output_dir: Path, callbacks: Any = None) -> ViTTrainer:
    """The recipe's trainer, as `finetune` builds it."""
    world = World(timeout=60, use_cpu=True)
    data = prepare_data(recipe.data)
    torch.manual_seed(recipe.training.seed)
    model, processor = load_model(recipe.model, data.labels)
    hardware = choose_hardware(recipe.training, recipe.model, model)
    shown = first_images(data, processor, recipe.augmentation, recipe.training.seed)
    loading = choose_loading(recipe.training, "off", shown, model, hardware)
    return ViTTrainer(
        model,
        processor,
        build_arguments(recipe.training, hardware, loading, output_dir, recipe.evaluation.batch_size),
        build_batches(data, processor, recipe.augmentation, recipe.training, hardware, loading, world, None),
        EvaluationImages(data.splits["validation"], processor),
        compute_metrics=lambda prediction: {
            "accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())
        },
        callbacks=callbacks,
    )


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kill_at", [5, 11])
def test_resumed_equals_uninterrupted(tmp_path: Path, workers: int, kill_at: int) -> None:
    """Checkpoints every second step, epochs of five: one resume lies inside an epoch, one between."""
    options = {
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "num_train_epochs": 3,
        "dataloader_num_workers": workers,
    }
    folder = split_shards(tmp_path / "shards", [7, 5, 6])
    recipe = tiny_recipe(
        folder, tmp_path, data=STREAMED, model=DROPOUT, augmentation=AUGMENTED, training=options
    )
    whole = build_trainer(recipe, tmp_path / "whole")
    whole.train()
    killed = build_trainer(recipe, tmp_path / "killed", [KillAt(kill_at)])
    with pytest.raises(Killed):
        killed.train()
    torch.manual_seed(999)  # another process begins with other random numbers
    resumed = build_trainer(recipe, tmp_path / "killed")
    newest = max((tmp_path / "killed").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert int(newest.name.split("-")[1]) == kill_at // 2 * 2
    resumed.train(resume_from_checkpoint=str(newest))
    assert resumed.state.global_step == whole.state.global_step == 15
    assert same(weights_of(resumed.model), weights_of(whole.model))
    history = [
        [e.get("eval_loss") for e in t.state.log_history if "eval_loss" in e] for t in (whole, resumed)
    ]
    assert history[0] == history[1]


@pytest.mark.slow
@pytest.mark.distributed
def test_one_process_equals_two(forks: ForkServer, tmp_path: Path) -> None:
    """Three shards over two processes, 16 images and 1: every step of theirs takes all 17, each once.

    The second process fills up: its share of a step is one image and one batch without any.
    """
    folder = split_shards(tmp_path / "shards", [9, 1, 7])
    runs = {}
    for processes, accumulation in ((1, 3), (2, 2)):
        recipe = tiny_recipe(
            folder,
            tmp_path / f"run{processes}",
            data=STREAMED,
            model={"config": {**TINY_VIT, "num_hidden_layers": 1}},
            augmentation=AUGMENTED,
            training={
                "per_device_train_batch_size": 8,
                "gradient_accumulation_steps": accumulation,
                "num_train_epochs": 4,
                "optim": "sgd",  # Adam turns the rounding of gradients near zero into steps
                "learning_rate": 0.1,
                "label_smoothing_factor": 0.1,
                "dataloader_num_workers": processes - 1,
            },
            evaluation={"batch_size": 4},
        )
        file = tmp_path / f"p{processes}.yaml"
        file.write_text(recipe.to_yaml(resolved=False))
        finish(forks.start_world(tmp_path / f"p{processes}", processes, "train", file))
        runs[processes] = Run(tmp_path / f"run{processes}")
        provenance = runs[processes].read_provenance()
        assert provenance["steps"] == 4
        assert provenance["data"]["splits"]["train"]["num_images"] == 17
    one, two = (load_file(runs[processes].model / "model.safetensors") for processes in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-6, rtol=0)
    first, second = (json.loads(runs[processes].report("test").read_text()) for processes in (1, 2))
    assert first["num_images"] == second["num_images"] == 7
    assert first["confusion_matrix"] == second["confusion_matrix"]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_come_to_the_end_of_every_epoch(forks: ForkServer, tmp_path: Path) -> None:
    """One process has five batches an epoch, the other one; one image cannot be read, and is told of."""
    folder = split_shards(tmp_path / "shards", [9, 2, 9])
    write_tar(folder / "train-001.tar", *sample(500), *sample(501), ("x.png", b"broken"), ("x.cls", b"red"))
    recipe = tiny_recipe(folder, tmp_path / "run", data={**STREAMED, "on_unreadable": "skip"})
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml(resolved=False))
    finish(forks.start_world(tmp_path / "two", 2, "train", file))
    provenance = Run(tmp_path / "run").read_provenance()
    assert provenance["steps"] == 2 * 5
    assert provenance["data"]["unreadable"] == [{"id": "train-001.tar/x", "problem": "not an image"}]


@pytest.mark.slow
def test_a_streamed_run_tells_the_same_story(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "shards", [20, 20, 20])
    recipe = tiny_recipe(
        folder, tmp_path / "run", data=STREAMED, training={"num_train_epochs": 6, "learning_rate": 0.01}
    )
    facts = check(recipe)
    run = finetune(recipe)
    provenance = run.read_provenance()
    data = prepare_data(recipe.data)
    assert isinstance(data, PreparedStream)
    counts = {name: about["num_images"] for name, about in provenance["data"]["splits"].items()}
    assert (
        counts
        == facts["splits"]
        == {"train": data.train.num_images} | {n: len(s) for n, s in data.splits.items()}
    )
    assert sum(counts.values()) == 60
    assert provenance["steps"] == facts["steps"] == 6 * -(-counts["train"] // 4)
    report = json.loads(run.report("test").read_text())
    assert report["num_images"] == counts["test"] and report["accuracy"] > 0.9
    ids = {row["id"] for row in pyarrow.parquet.read_table(run.predictions("test")).to_pylist()}
    assert ids == set(data.splits["test"]["id"][:])
    assert sorted(file.name for file in run.splits.iterdir()) == ["test.csv", "validation.csv"]
    assert (run.pictures / "augmented.jpg").is_file() and run.report_html.is_file()
    assert evaluate(run.path).accuracy == report["accuracy"]
    with pytest.raises(RunError, match="there is no split 'train'"):
        evaluate(run.path, split="train")
    provenance["hardware"]["processes"] = 2
    model, processor = load_model(recipe.model, NAMES)
    hardware = choose_hardware(recipe.training, recipe.model, model)
    shown = first_images(data, processor, recipe.augmentation, recipe.training.seed)
    loading = choose_loading(recipe.training, "off", shown, model, hardware)
    world = World(timeout=60, use_cpu=True)
    with pytest.raises(RunError, match="started with 2 processes"):
        build_batches(
            data, processor, recipe.augmentation, recipe.training, hardware, loading, world, provenance
        )
    provenance["choices"] = [{"name": "loader processes", "value": "3"}]
    assert keep_workers(recipe.training, provenance).dataloader_num_workers == 3


MEASURE = """
import sys
from torch.utils.data import DataLoader
from vit_finetune.data.streaming.prepared import prepare_data
from vit_finetune.data.transforms import ImageFiles
from vit_finetune.data.sources.source import load_source
from vit_finetune.recipe import DataConfig

def status(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

def read(path):
    if sys.argv[1] == "held":
        files = ImageFiles(load_source(DataConfig(path=path)).splits["train"])
        return sum(files[number].shape[0] == 3 for number in range(len(files)))
    config = DataConfig(path=path, streaming=True, shuffle_buffer=100, validation_fraction=0.05, test_fraction=0)
    train = prepare_data(config).train
    return sum(len(row.encoded) > 0 for row in train.read(0, 1, 0, 0))

read(sys.argv[2])  # what the libraries need is there afterwards
start = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
count = read(sys.argv[3])
print(count, status("VmHWM") - start)
"""


def peak_growth(kind: str, warm: Path, folder: Path) -> tuple[int, float]:
    """Images read by a process of its own, and by how many MB its memory grew at most."""
    words = [sys.executable, "-c", MEASURE, kind, str(warm), str(folder)]
    result = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    images, kilobytes = map(int, result.stdout.split())
    return images, kilobytes / 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux counts it")
@pytest.mark.parametrize("kind", ["tar", "parquet", "held"])
def test_memory_stays_flat(tmp_path: Path, kind: str) -> None:
    """20 MB of images and 160 MB: the peaks may differ by 60 MB; holding the images would take 140.

    `datasets` reads ten shards at a time, so there are at least as many.
    """
    base = draw_png(0, (180, 150))  # what follows a PNG's end is passed over, and makes 80 kB of it
    grown = {}
    for name, shards, rows in (("warm", 1, 50), ("small", 10, 25), ("large", 20, 100)):
        for shard in range(shards):
            random = np.random.default_rng([rows, shard])
            pictures = [base + random.bytes(80_000 - len(base)) for _ in range(rows)]
            folder = tmp_path / name
            if kind == "parquet":
                folder.mkdir(exist_ok=True)
                table = pyarrow.table({"image": pictures, "label": [str(n % 3) for n in range(rows)]})
                pyarrow.parquet.write_table(table, folder / f"train-{shard}.parquet", row_group_size=10)
            else:
                members = [
                    (f"{n}.{e}", d)
                    for n, p in enumerate(pictures)
                    for e, d in (("png", p), ("cls", b"%d" % (n % 3)))
                ]
                write_tar(folder / f"train-{shard}.tar", *members)
        if name != "warm":
            grown[name] = peak_growth(kind, tmp_path / "warm", tmp_path / name)
    (few, small), (many, large) = grown["small"], grown["large"]
    print(f"{kind}: {few} images {small:.0f} MB, {many} images {large:.0f} MB")
    assert 7 < many / few < 9
    assert large - small < 60
