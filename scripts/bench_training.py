"""Training speed end to end: ours, transformers' example and timm's train.py, against the machine's limits.

.venv/bin/python scripts/bench_training.py CIFAR10 --timm-train pytorch-image-models/train.py

CIFAR10 has class folders in train/. Each row is a process of its own that trains ViT-Ti (12 layers, width
192, patch 4, 32 px: 65 tokens) from scratch on batches of 128; rows take turns, so that a machine whose speed
drifts slows all alike. Images per second are those of the training loop: no start-up, evaluation, checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_table import print_table

BATCH, LEARNING_RATE = 128, 1e-3
SIZES = {
    "hidden_size": 192,
    "num_hidden_layers": 12,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "patch_size": 4,
    "image_size": 32,
}


def build_model(attention: str) -> Any:
    """The ViT-Ti that all rows train, in transformers' own words."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**SIZES, num_labels=10))
    model.set_attn_implementation(attention)
    return model.train()


# --------------------------------------------------------------------------- rows: images per second


def run_ours(data: Path, steps: int, *overrides: str) -> float:
    """`vit-finetune train` with our defaults; the loop's time from its provenance."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = {
            "data": {"path": str(data)},
            "model": {"config": SIZES},
            "training": {
                "output_dir": f"{folder}/run",
                "max_steps": steps,
                "per_device_train_batch_size": BATCH,
                "learning_rate": LEARNING_RATE,
            },
        }
        file = Path(folder) / "bench.yaml"
        file.write_text(json.dumps(recipe))
        words = [sys.executable, "-m", "vit_finetune", "train", str(file), *overrides]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        print(done.stderr.splitlines()[-1], file=sys.stderr)
        spent = json.loads((Path(folder) / "run" / "provenance.json").read_text())["seconds"]
        return steps * BATCH / (spent["total"] - spent["evaluation"] - spent["checkpoints"])


def run_example(data: Path, steps: int, bf16: bool = False) -> float:
    """What transformers' run_image_classification.py does, with its defaults but for the batch of 128.

    `datasets`' imagefolder, Pillow, torchvision v1 transforms under `set_transform`, the stock Trainer.
    """
    import torch
    from bench_example import collate_example, load_example_images
    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        images = load_example_images(data / "train", Path(folder) / "cache", 32)
        arguments = TrainingArguments(
            f"{folder}/run", max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=LEARNING_RATE,
            remove_unused_columns=False, use_cpu=not torch.accelerator.is_available(), bf16=bf16,
            save_strategy="no", report_to="none",
        )  # fmt: skip
        trainer = Trainer(build_model("sdpa"), arguments, train_dataset=images, data_collator=collate_example)
        metrics = trainer.train().metrics
        return steps * BATCH / float(metrics["train_runtime"])


def run_timm(data: Path, steps: int, script: Path, *flags: str) -> float:
    """timm's train.py; the mean of the update times that it logs, without the first ones."""
    with tempfile.TemporaryDirectory() as folder:
        device = "cuda" if _has_gpu() else "cpu"
        words = [
            sys.executable, str(script), "--data-dir", str(data),
            "--train-split", "train", "--val-split", "validation",
            "--model", "vit_tiny_patch16_224", "--model-kwargs", "patch_size=4", "img_size=32",
            "--img-size", "32", "--num-classes", "10", "-b", str(BATCH), "--epochs", "1",
            "--warmup-epochs", "0", "--opt", "adamw", "--lr", str(LEARNING_RATE),
            "--device", device, "--log-interval", "1", "--workers", "0", "--output", folder, *flags,
        ]  # fmt: skip
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        text = done.stdout + done.stderr
        times = [
            float(seconds) for seconds in re.findall(r"Train: 0 \[.*?Time: ([\d.]+)s", text)
        ]  # of one update each
        if done.returncode or len(times) < 5:
            sys.exit(text[-3000:])
        return BATCH / (sum(times[2:-1]) / len(times[2:-1]))


def run_loop(data: Path, steps: int, attention: str, bf16: bool, compiled: bool = False) -> float:
    """A bare PyTorch loop over one ready batch: forward, backward, clipping, fused AdamW; nothing else."""
    import torch

    device = "cuda" if _has_gpu() else "cpu"
    model = build_model(attention).to(device)
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, fused=True)
    images, labels = (
        torch.randn(BATCH, 3, 32, 32, device=device),
        torch.randint(0, 10, (BATCH,), device=device),
    )

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            logits = forward(pixel_values=images).logits
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    return steps * BATCH / _seconds(lambda: [step() for _ in range(steps)], device)


def run_peak(data: Path, steps: int) -> float:
    """Images per second if all of the step were matrix products of the MLP's shape, at the best precision."""
    import torch

    device = "cuda" if _has_gpu() else "cpu"
    width, tokens, layers = SIZES["hidden_size"], 65, SIZES["num_hidden_layers"]
    best = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        left = torch.randn(BATCH * tokens, width, device=device, dtype=dtype)
        right = torch.randn(width, 4 * width, device=device, dtype=dtype)
        left @ right
        seconds = _seconds(lambda left=left, right=right: [left @ right for _ in range(20)], device)
        best = max(best, 20 * 2 * left.shape[0] * width * 4 * width / seconds)
    products = 12 * width * width * tokens + 2 * tokens * tokens * width  # multiply-adds of one layer
    return best / (3 * 2 * layers * products)  # forward, and twice that backward


def _seconds(work: Callable[[], Any], device: str) -> float:
    import torch

    wait = torch.accelerator.synchronize if device != "cpu" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def _has_gpu() -> bool:
    import torch

    return bool(torch.accelerator.is_available())


# --------------------------------------------------------------------------- the table


def take_sample(data: Path, steps: int, folder: Path) -> Path:
    """An epoch of so many steps, and a few images to validate and test on, as links to the files."""
    for name in sorted(path.name for path in (data / "train").iterdir()):
        files = sorted((data / "train" / name).iterdir())
        count = steps * BATCH // 10 + 1
        for split, some in (("train", files[:count]), ("validation", files[-2:]), ("test", files[-4:-2])):
            (folder / split / name).mkdir(parents=True)
            for file in some:
                (folder / split / name / file.name).symlink_to(file)
    return folder


def build_rows(timm_train: Path | None) -> dict[str, Callable[[Path, int], float]]:
    """What is measured, by the row's name; the first is what the others are compared with."""
    rows: dict[str, Callable[[Path, int], float]] = {
        "transformers' example, its defaults": run_example,
        "transformers' example, bf16": lambda data, steps: run_example(data, steps, bf16=True),
        "vit-finetune, our defaults": run_ours,
        "bare loop, fp32 sdpa": lambda data, steps: run_loop(data, steps, "sdpa", False),
        "bare loop, bf16 sdpa": lambda data, steps: run_loop(data, steps, "sdpa", True),
        "bare loop, bf16 eager": lambda data, steps: run_loop(data, steps, "eager", True),
        "bare loop, bf16 eager, compiled": lambda data, steps: run_loop(data, steps, "eager", True, True),
        "limit: matrix products alone": run_peak,
    }
    if timm_train:
        amp = ("--amp", "--amp-dtype", "bfloat16")
        rows |= {
            "timm, its defaults": lambda data, steps: run_timm(data, steps, timm_train),
            "timm, amp bf16": lambda data, steps: run_timm(data, steps, timm_train, *amp),
            "timm, amp bf16, compiled": lambda data, steps: run_timm(
                data, steps, timm_train, *amp, "--torchcompile"
            ),
        }
    return rows


def main() -> None:
    """Prints the table, or with --row one row's images per second."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="CIFAR10")
    parser.add_argument("--timm-train", type=Path, help="timm's train.py; left out if not given")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="rows whose name contains one of these")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    rows = build_rows(options.timm_train and options.timm_train.resolve())
    if options.row:
        with tempfile.TemporaryDirectory() as folder:
            print(
                rows[options.row](
                    take_sample(options.data.resolve(), options.steps, Path(folder)), options.steps
                )
            )
        return
    names = [name for name in rows if not options.only or any(part in name for part in options.only)]
    rates: dict[str, list[float]] = {name: [] for name in names}
    for number in range(options.rounds):
        for name in names:
            words = [sys.executable, *sys.argv, "--row", name]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False, env=os.environ)
            if done.returncode:
                sys.exit(f"{name}: failed")
            rates[name].append(float(done.stdout.split()[-1]))
            print(f"round {number + 1}: {name}: {rates[name][-1]:.1f} images/s", file=sys.stderr)
    print_table("ViT-Ti, 32 px, batch 128", rates)


if __name__ == "__main__":
    main()
