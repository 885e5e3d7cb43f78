"""One process equals two: the same weights, the same report, every image counted once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY_VIT, tiny_recipe
from safetensors.torch import load_file

from vit_finetune.run import Run


def launch(recipe: Path, processes: int) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "vit_finetune", "train", str(recipe)]
    if processes > 1:
        words[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        words[words.index("vit_finetune") - 1 :] = ["-m", "vit_finetune", "train", str(recipe)]
    return subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300
    )


@pytest.mark.slow
@pytest.mark.distributed
def test_one_process_equals_two(folder: Path, tmp_path: Path) -> None:
    """18 training and 9 test images: neither divides evenly by the processes and their batches."""
    runs = {}
    for processes in (1, 2):
        training = {
            "per_device_train_batch_size": 6 // processes,
            "optim": "sgd",  # Adam turns the rounding of gradients near zero into steps
            "learning_rate": 0.1,
            "label_smoothing_factor": 0.1,
        }
        recipe = tiny_recipe(
            folder,
            tmp_path / f"run{processes}",
            model={"config": {**TINY_VIT, "num_hidden_layers": 1}},
            augmentation={"policy": "trivialaugment"},
            training=training,
            evaluation={"batch_size": 4},
        )
        file = tmp_path / f"p{processes}.yaml"
        file.write_text(recipe.to_yaml(resolved=False))
        result = launch(file, processes)
        assert result.returncode == 0, result.stderr[-3000:]
        opening = (
            f"{processes} process{'es' if processes > 1 else ''} × {6 // processes} images × 1 accumulation"
        )
        assert result.stderr.count(f"{opening} = 6 images per step") == 1  # only the main process talks
        runs[processes] = Run(tmp_path / f"run{processes}")
    one, two = (load_file(runs[processes].model / "model.safetensors") for processes in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-6, rtol=0)
    first, second = (json.loads(runs[processes].report("test").read_text()) for processes in (1, 2))
    assert first["num_images"] == second["num_images"] == 9
    assert first["confusion_matrix"] == second["confusion_matrix"]
    assert first["log_loss"] == pytest.approx(second["log_loss"], abs=1e-6)
