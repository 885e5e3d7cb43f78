"""One process against several on this machine, and what exchanging gradients costs, setting by setting.

.venv/bin/python scripts/bench_scaling.py [--model base] [--processes 2] [--batch 64]

Each process trains on a ready batch (no loader). On CPUs one process has all threads, of several each has its
share; on GPUs each process has one. The settings of DistributedDataParallel take turns within the same
processes, and one process takes turns with several, so that a machine whose speed drifts slows all alike.
What exchanging costs is told from the same steps without it (`no_sync`).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from bench_table import print_table

MODELS = {
    "tiny": {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768,
             "patch_size": 4, "image_size": 32},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
             "intermediate_size": 3072, "patch_size": 16, "image_size": 224},
}  # fmt: skip
OURS = "ours"
SETTINGS: dict[str, dict[str, Any]] = {
    OURS: {},
    "ours, static graph": {"static_graph": True},
    "ours, buckets of 5 MB": {"bucket_cap_mb": 5},
    "ours, buckets of 100 MB": {"bucket_cap_mb": 100},
    "ours, gradients as views of buckets": {"gradient_as_bucket_view": True},
    "the Trainer's: looks for unused weights": {"find_unused_parameters": True},
}
ALONE, APART = "one process", "ours, without exchanging"


# --------------------------------------------------------------------------- in each process


def measure(model_name: str, batch: int, steps: int, bf16: bool) -> dict[str, list[float]]:
    """Seconds of each step by setting, of this process."""
    import torch
    from torch.nn.parallel import DistributedDataParallel
    from transformers import ViTConfig, ViTForImageClassification

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if world > 1:
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo")

    def build(settings: dict[str, Any] | None) -> Callable[[], float]:
        torch.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(**MODELS[model_name], num_labels=10)).to(device).train()
        model.set_attn_implementation("eager" if bf16 and not on_gpu else "sdpa")
        size = MODELS[model_name]["image_size"]
        pixels = torch.randn(batch, 3, size, size, device=device)
        labels = torch.randint(10, (batch,), device=device)
        wrapped: Any = model
        if settings is not None:
            wrapped = DistributedDataParallel(
                model, device_ids=[rank] if on_gpu else None, **({"find_unused_parameters": False} | settings)
            )
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def step(exchanging: bool = True) -> float:
            if on_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            with wrapped.no_sync() if not exchanging else nullcontext():
                with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
                    logits = wrapped(pixel_values=pixels).logits
                torch.nn.functional.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            if on_gpu:
                torch.cuda.synchronize()
            return time.perf_counter() - start

        return step

    if world == 1:
        takers: dict[str, Callable[[], float]] = {ALONE: build(None)}
    else:
        takers = {name: build(settings) for name, settings in SETTINGS.items()}
        ours = takers[OURS]
        takers[APART] = lambda: ours(False)  # type: ignore[call-arg]
    seconds: dict[str, list[float]] = {name: [] for name in takers}
    for number in range(steps + 2):
        for name, step in takers.items():
            if world > 1:
                torch.distributed.barrier()
            taken = step()
            if number >= 2:  # after warming up
                seconds[name].append(taken)
    return seconds


# --------------------------------------------------------------------------- all of them


def launch(options: argparse.Namespace, processes: int, threads: int) -> dict[str, list[float]]:
    """Starts the processes; seconds of each step by setting, of the slowest process at a time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, __file__, "--worker", json.dumps(vars(options))]
    environment = {**os.environ, "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": str(threads),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    running = [
        subprocess.Popen(words, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(processes)
    ]
    answers = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        sys.exit("a process failed: its words are above")
    measured = [json.loads(answer.splitlines()[-1]) for answer in answers]
    return {name: [max(step) for step in zip(*(each[name] for each in measured))] for name in measured[0]}


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64, help="images per process and step")
    parser.add_argument("--steps", type=int, default=10, help="of each setting, in every round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fp32", action="store_true", help="instead of bf16")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        given = json.loads(options.worker)
        print(json.dumps(measure(given["model"], given["batch"], given["steps"], not given["fp32"])))
        return
    cores = len(os.sched_getaffinity(0))
    rates: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for processes in (1, options.processes):
            for name, seconds in launch(options, processes, max(1, cores // processes)).items():
                images = processes * options.batch
                rates.setdefault(name, []).append(images / statistics.median(seconds))
    print_table(f"ViT-{options.model}, {options.processes} processes × {options.batch} images", rates)
    for name in SETTINGS:
        share = statistics.median(1 - with_ / without for with_, without in zip(rates[name], rates[APART]))
        print(f"{name}: exchanging takes {share:.1%} of a step")


if __name__ == "__main__":
    main()
