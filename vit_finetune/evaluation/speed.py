"""What a model costs to serve: floating-point operations, and images per second on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from vit_finetune.console import progress
from vit_finetune.evaluation.scoring import scoring_mode

ROUNDS = 5
"""Each model is timed so often, in turns, so that what else the machine does meets all of them."""
SECONDS = 0.3
"""How long a model is timed in each round, at least."""


def count_flops(model: PreTrainedModel, size: tuple[int, int]) -> int:
    """Floating-point operations of one image's way through a model, forward.

    Two for each multiplication with its addition, in convolutions, linear layers and attention; norms,
    activations and softmax, some per cent, are left out. Nothing is computed: shapes suffice.

    Args:
        model: of any architecture.
        size: height and width in pixels.
    """
    with torch.device("meta"):
        # Attention kernels in one piece are not counted everywhere, the products that they are made of are.
        shape = type(model)._from_config(model.config, attn_implementation="eager").eval()
        pixel_values = torch.zeros(1, 3, *size)  # (1, 3, H, W)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            shape(pixel_values=pixel_values)
    return int(counter.get_total_flops())


def measure_serving(
    models: Mapping[str, tuple[PreTrainedModel, tuple[int, int]]], batch_size: int
) -> dict[str, float]:
    """Images per second that each model answers, as a median over rounds in which they take turns.

    The forward pass alone: neither reading nor resizing images.

    Args:
        models: by name, with height and width of its images in pixels; all on one device.
        batch_size: images at a time.
    """

    def answering(model: PreTrainedModel, size: tuple[int, int]) -> Callable[[], object]:
        pixel_values = torch.zeros(batch_size, 3, *size, device=model.device)  # (B, 3, H, W)

        return lambda: model(pixel_values=pixel_values).logits.cpu()  # which waits for an accelerator

    work = {name: answering(*model) for name, model in models.items()}
    with ExitStack() as stack:
        for model, _ in models.values():
            stack.enter_context(scoring_mode(model))
        rates = repeat_in_turns(work, f"timing, {batch_size} at a time")
    return {name: rate * batch_size for name, rate in rates.items()}


def repeat_in_turns(work: Mapping[str, Callable[[], object]], description: str) -> dict[str, float]:
    """How often per second each piece of work is done, as a median over rounds in which they take turns.

    Args:
        work: what to do, by name.
        description: what is said while it lasts.
    """
    rates: dict[str, list[float]] = {name: [] for name in work}
    with progress(description, ROUNDS * len(work), "turns") as advance:
        for number in range(ROUNDS + 1):
            for name, do in work.items():
                count, start = 0, time.perf_counter()
                while not count or (number and time.perf_counter() - start < SECONDS):
                    do()
                    count += 1
                if number:  # the round before the first one warms up
                    rates[name].append(count / (time.perf_counter() - start))
                    advance()
    return {name: statistics.median(measured) for name, measured in rates.items()}
