"""Precision, attention kernel and batch size: chosen for this machine, with the reason."""

from __future__ import annotations

import math
import os
import platform
import resource
import sys
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from vit_finetune.recipe import ModelConfig, TrainingConfig
from vit_finetune.run import RunError

MEMORY_SHARE = 0.7
"""Share of the free memory that an automatic batch size may fill by estimate."""
LARGEST_AUTOMATIC_BATCH = 128
"""Beyond it, throughput gains little and the learning rate would have to follow."""


STEP_SECONDS = 0.5
"""How long a training step is measured for, beside warming up."""
AS_BEFORE = "as when the run began"
"""Why a resumed run chooses what it chooses."""


@dataclass(frozen=True)
class Choice:
    """One thing that was decided for the machine, and why."""

    name: str
    value: str
    reason: str


@dataclass
class Hardware:
    """What a run uses of the machine."""

    use_cpu: bool
    bf16: bool
    fp16: bool
    attn_implementation: str
    batch_size: int
    """Images per device and batch."""
    accumulation: int = 1
    """Batches per step."""
    choices: list[Choice] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """What the model trains on."""
        accelerator = None if self.use_cpu else torch.accelerator.current_accelerator()
        return accelerator or torch.device("cpu")

    @property
    def autocast(self) -> torch.dtype | None:
        """The type that matrix products are computed in; None for float32."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else None


def choose_hardware(
    training: TrainingConfig,
    config: ModelConfig,
    model: PreTrainedModel,
    before: dict[str, Any] | None = None,
    processes: int = 1,
    teacher: PreTrainedModel | None = None,
) -> Hardware:
    """What the recipe says, and for what it leaves `auto` the best for this machine.

    Args:
        training: the recipe's section.
        config: the recipe's section.
        model: what will be trained.
        before: provenance of the run that is resumed; what changes its numbers is then chosen as it was.
        processes: how many train together.
        teacher: what it is distilled from; takes memory.

    Raises:
        RunError: bf16 and fp16 are both asked for, or the images of a step of the run to resume cannot be
            divided over the processes.
    """
    use_cpu = training.use_cpu or not torch.accelerator.is_available()
    if before:
        chosen = {choice["name"]: choice["value"] for choice in before["choices"]}
        precision = chosen["precision"]
        training = training.model_copy(
            update={
                "bf16": precision == "bf16",
                "fp16": precision == "fp16",
                "per_device_train_batch_size": int(chosen["batch"])
                if training.per_device_train_batch_size == "auto"
                else training.per_device_train_batch_size,
            }
        )
        config = config.model_copy(update={"attn_implementation": chosen["attention"]})
    bf16, fp16, precision = _choose_precision(training, config, model, use_cpu)
    attention = _choose_attention(config, model, use_cpu, bf16)
    batch = _choose_batch(training, model, use_cpu, teacher)
    choices = [precision, attention, batch]
    accumulation = training.gradient_accumulation_steps
    if before:
        size, accumulation = divide_step(before["images_per_step"], processes, int(batch.value))
        batch = replace(batch, value=str(size))
        choices = [replace(choice, reason=AS_BEFORE) for choice in (precision, attention)]
        kept = f"keeps the {before['images_per_step']} images per step that the run was begun with"
        choices += [replace(batch, reason=kept), Choice("accumulation", str(accumulation), kept)]
    return Hardware(use_cpu, bf16, fp16, attention.value, int(batch.value), accumulation, choices)


def divide_step(images: int, processes: int, batch_size: int) -> tuple[int, int]:
    """Images per batch, and batches per step of each process, so that a step has as many images as before.

    Args:
        images: per step, of all processes.
        processes: how many there are now.
        batch_size: most images per batch; the largest that goes is taken.

    Raises:
        RunError: the images cannot be divided over so many processes.
    """
    each, rest = divmod(images, processes)
    if rest:
        possible = ", ".join(str(count) for count in range(1, images + 1) if images % count == 0)
        raise RunError(
            f"the run was begun with {images} images per step, which {processes} processes cannot share "
            f"evenly. Resume it with one of {possible} processes"
        )
    size = next(size for size in range(min(batch_size, each), 0, -1) if each % size == 0)
    return size, each // size


def _choose_precision(
    training: TrainingConfig, config: ModelConfig, model: PreTrainedModel, use_cpu: bool
) -> tuple[bool, bool, Choice]:
    if training.bf16 is True and training.fp16 is True:
        raise RunError("training.bf16 and training.fp16 are both true; write one of them")
    if training.bf16 is True or training.fp16 is True:
        name = "bf16" if training.bf16 is True else "fp16"
        return name == "bf16", name == "fp16", Choice("precision", name, "the recipe says so")
    if training.bf16 is False:
        # fp16 is only ever chosen for GPUs without bf16, where it is what `auto` falls back on.
        return False, False, Choice("precision", "fp32", "the recipe says so")
    if use_cpu:
        ratio = bf16_speedup(model, config, training.per_device_train_batch_size)
        name = "bf16" if ratio > 1.3 else "fp32"  # by more than measuring is off
        reason = f"a training step of this model in bf16 has {ratio:.1f} times the fp32 speed on this CPU"
        return name == "bf16", False, Choice("precision", name, reason)
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        return True, False, Choice("precision", "bf16", f"{torch.cuda.get_device_name()} computes in bf16")
    if torch.cuda.is_available() and training.fp16 == "auto":
        return False, True, Choice("precision", "fp16", f"{torch.cuda.get_device_name()} has no bf16")
    return (
        False,
        False,
        Choice("precision", "fp32", "neither bf16 nor fp16 is known to work on this accelerator"),
    )


def bf16_speedup(model: PreTrainedModel, config: ModelConfig, batch_size: int | str) -> float:
    """Speed of a training step on this CPU in bf16 by that in fp32, each with the attention it would have.

    The faster of two measurements each, in turns, since others may use the machine for a moment. Takes two
    seconds, more with large models. Neither the weights nor any random state is changed.

    Args:
        model: what will be trained.
        config: the recipe's section.
        batch_size: images for each step, or `auto`.
    """
    seconds = {False: math.inf, True: math.inf}
    largest = batch_size if isinstance(batch_size, int) else LARGEST_AUTOMATIC_BATCH
    for bf16 in (False, True, False, True):
        model.set_attn_implementation(_choose_attention(config, model, True, bf16).value)
        precision = torch.bfloat16 if bf16 else None
        seconds[bf16] = min(seconds[bf16], measure_step(model, torch.device("cpu"), precision, largest))
    return seconds[False] / seconds[True]


def measure_step(
    model: PreTrainedModel, device: torch.device, autocast: torch.dtype | None, batch_size: int
) -> float:
    """Seconds an image of forward and backward; neither weights nor any random state is changed.

    Args:
        model: is moved to the device.
        device: to compute on.
        autocast: bfloat16, float16 or None for float32.
        batch_size: most images at a time; fewer where they would take more than `STEP_SECONDS`, or more
            memory than there is (training may do with less, recomputing activations).
    """
    model.to(device)
    was_training = model.training
    model.eval()  # so that batch norms learn nothing from it
    precision = torch.autocast(device.type, autocast) if autocast else nullcontext()

    def step(count: int) -> float:
        pixels = torch.zeros(count, model.config.num_channels, *image_size_of(model), device=device)
        _synchronize(device)
        start = time.perf_counter()
        with precision:
            loss = model(pixel_values=pixels).logits.float().square().mean()
        loss.backward()
        _synchronize(device)
        return time.perf_counter() - start

    with randomness_kept(device):
        step(2)
        each, count = step(2) / 2, 2
        # A large model on a CPU takes seconds for a batch: then a smaller one has to do. On a GPU a few
        # images take as long as many, so that how many there is time for only shows step by step.
        with suppress(torch.OutOfMemoryError):
            while (more := min(4 * count, batch_size, int(STEP_SECONDS / each))) > count:
                step(more)
                each, count = step(more) / more, more
            each = min(each, step(count) / count)
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # `peak_memory` is that of training
    return each


def randomness_kept(device: torch.device) -> AbstractContextManager[None]:
    """A block after which the CPU's and the device's random numbers go on as if it had not been."""
    return torch.random.fork_rng([torch.cuda.current_device()] if device.type == "cuda" else [])


def share_casts(model: PreTrainedModel) -> None:
    """Lets the products that follow a norm share one cast of its output, where a CPU computes in bf16.

    Autocast leaves a LayerNorm's output in float32, and each of the query's, key's and value's products casts
    it anew, and its gradient back: a tenth of a small ViT's step on a CPU. What the products see is the same,
    bit for bit; their gradients are summed in bf16. Outside autocast nothing changes, and nothing is saved.

    Args:
        model: a ViT of transformers, whose norms before attention and MLP feed matrix products alone; others
            are left as they are.
    """

    def cast(norm: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else output

    if model.config.model_type == "vit":
        for name, module in model.named_modules():
            if name.endswith((".layernorm_before", ".layernorm_after")):
                module.register_forward_hook(cast)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _choose_attention(config: ModelConfig, model: PreTrainedModel, use_cpu: bool, bf16: bool) -> Choice:
    if config.attn_implementation != "auto":
        return Choice("attention", config.attn_implementation, "the recipe says so")
    if not getattr(model, "_supports_sdpa", False):
        return Choice("attention", "eager", f"{type(model).__name__} has no other")
    if use_cpu and bf16:
        return Choice(
            "attention", "eager", "on CPUs in bf16 plain matrix products are faster than the fused kernel"
        )
    return Choice("attention", "sdpa", "the fused kernel")


def _choose_batch(
    training: TrainingConfig, model: PreTrainedModel, use_cpu: bool, teacher: PreTrainedModel | None
) -> Choice:
    if training.per_device_train_batch_size != "auto":
        return Choice("batch", str(training.per_device_train_batch_size), "the recipe says so")
    free = psutil.virtual_memory().available if use_cpu else torch.cuda.mem_get_info()[0]
    if use_cpu:
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    tested = training.learning_rate == "auto"
    fixed, each = estimate_memory(model, training.ema_decay > 0, teacher, tested)
    batch = LARGEST_AUTOMATIC_BATCH
    while batch > 1 and fixed + batch * each > MEMORY_SHARE * free:
        batch //= 2
    return Choice(
        "batch",
        str(batch),
        f"about {(fixed + batch * each) / 1e9:.1f} GB by estimate, {free / 1e9:.1f} GB free; at most "
        f"{LARGEST_AUTOMATIC_BATCH}",
    )


def estimate_memory(
    model: PreTrainedModel,
    averages: bool = False,
    teacher: PreTrainedModel | None = None,
    tested: bool = False,
) -> tuple[int, int]:
    """Bytes that training takes whatever the batch, and bytes for each image of a batch, in fp32 with AdamW.

    The first are weights, gradients and two moments, and, where `averages` are kept of those that learn,
    these, and the weights of a `teacher`, which keeps nothing for a backward pass. Where the learning rate is
    `tested` on a copy of the model, the weights lie beside it, at a time at which no average is kept.
    The second are counted, not guessed: what one image's forward pass keeps for the backward pass. The
    allocator's own share is left out.
    """
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    height, width = image_size_of(model)
    was_training, buffers = model.training, [(buffer, buffer.clone()) for buffer in model.buffers()]
    hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
    with randomness_kept(model.device), hooks:
        pixels = torch.zeros(2, model.config.num_channels, height, width, device=model.device)
        output = model.train()(pixel_values=pixels).logits.sum()
    del output
    model.train(was_training)
    for buffer, before in buffers:  # what batch norms learnt from it
        buffer.copy_(before)
    asked = sum(p.numel() for p in teacher.parameters()) if teacher is not None else 0
    beside = max(parameters if tested else 0, trained if averages else 0)
    return 4 * (parameters + 3 * trained + beside + asked), sum(kept.values()) // 2


def image_size_of(model: PreTrainedModel) -> tuple[int, int]:
    """Height and width in pixels of the images that a model takes."""
    size = model.config.image_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def describe_hardware(use_cpu: bool, processes: int) -> dict[str, Any]:
    """Device, memory in bytes and number of processes, for the provenance; no host name."""
    if use_cpu:
        device = f"CPU: {_cpu_name()}, {psutil.cpu_count(logical=True)} cores"
        memory = psutil.virtual_memory().total
    else:
        device = (
            torch.cuda.get_device_name()
            if torch.cuda.is_available()
            else str(torch.accelerator.current_accelerator())
        )
        memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    return {"device": device, "memory_bytes": memory, "processes": processes, "system": platform.system()}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory(use_cpu: bool) -> int:
    """Most bytes used so far: of this process, or allocated by torch on its GPU."""
    if not use_cpu and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
