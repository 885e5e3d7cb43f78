"""A classifier as an ONNX file, the same in int8, and the script that uses either without torch.

The one module of this room that loads torch: it traces the model.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from vit_finetune.files import is_disk_full
from vit_finetune.run import RunError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from transformers import BaseImageProcessor, PreTrainedModel

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""What the extra `onnx` installs."""
FLOAT_FILE, INT8_FILE, SCRIPT = "model.onnx", "model_int8.onnx", "predict_onnx.py"
INPUT, OUTPUT = "pixel_values", "logits"
OPSET = 18
"""Of the ONNX operators: the one that torch translates to without converting further; every onnxruntime since
1.14 (February 2023) reads it, the one for browsers too."""
TOLERANCE = 1e-4
"""Largest difference of a probability with which a file counts as the same model."""
INT8_METHOD = "static, per channel, ranges by minimum and maximum"
QUANTIZED = ["Conv", "MatMul", "Gemm"]
"""Operators that become int8: all that multiply weights. Softmax, layer norm, GELU and sums stay in float."""


def check_packages() -> None:
    """Raises RunError unless everything is installed that writes and runs ONNX files."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise RunError(
            f"export needs {', '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not installed "
            f"here: pip install 'vit-finetune[onnx]'"
        )


class _Logits(nn.Module):
    """A classifier that answers with a tensor: `(batch, 3, height, width)` → `(batch, classes)`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(pixel_values=pixel_values).logits
        return logits


def write_onnx(model: PreTrainedModel, size: tuple[int, int], path: Path) -> None:
    """Writes a model as ONNX: `pixel_values` float32 `(batch, 3, H, W)` → `logits` `(batch, classes)`.

    The batch is free, height and width are the model's. Weights above 2 GB lie in a file beside.

    Args:
        model: in float32 on the CPU, without adapters.
        size: height and width in pixels.
        path: of the file.

    Raises:
        RunError: torch cannot translate this architecture, or what it wrote is no valid file.
    """
    import onnx

    examples = torch.zeros(2, 3, *size)  # torch takes a dimension of 1 for a fixed one
    kind = model.config.model_type
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                _Logits(model).eval(),  # a new module is in training mode, whatever it holds
                (examples,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=OPSET,
                dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
                verbose=False,
            )
            assert program is not None
            program.save(str(path))
            onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        if is_disk_full(error):
            raise
        raise RunError(
            f"{kind} models cannot be exported with torch {version('torch')}: {_reason(error)}. "
            f"Nothing was written"
        ) from error


def _reason(error: BaseException) -> str:
    """What torch says went wrong, without the pages around it: the first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}".rstrip(": .")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the log lines of libraries that translate and quantise; what matters of them are exceptions."""
    loggers = [
        logging.getLogger(name) for name in (None, "torch.onnx", "onnxscript", "onnx_ir", "onnxruntime")
    ]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for one, level in zip(loggers, levels):
            one.setLevel(level)


def open_session(path: Path, threads: int) -> InferenceSession:
    """A file that is ready to answer, on the CPU.

    Args:
        path: of an ONNX file.
        threads: that compute one operator together.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def answer(session: InferenceSession, pixel_values: np.ndarray) -> np.ndarray:
    """Logits float32 `(batch, classes)` of float32 `(batch, 3, height, width)`."""
    logits: np.ndarray = session.run([OUTPUT], {INPUT: pixel_values})[0]
    return logits


class _Feed:
    """What onnxruntime asks for batches to calibrate on."""

    def __init__(self, batches: Iterable[np.ndarray]) -> None:
        self.batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {INPUT: batch}


def write_int8(source: Path, path: Path, batches: Iterable[np.ndarray]) -> None:
    """Writes an ONNX file with weights and inputs of its products as 8-bit integers.

    Args:
        source: the file in float.
        path: of the file to write.
        batches: images to calibrate on, each float32 `(batch, 3, height, width)`.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(prefix="vit-finetune-") as scratch, _quiet():
        prepared = Path(scratch) / "prepared.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            path,
            _Feed(batches),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=QUANTIZED,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )


def time_in_turns(work: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Seconds that each piece of work takes, by name: the median.

    They take turns, so that what else the machine does slows all of them.

    Args:
        work: what to do, by name.
        seconds: how long to go on with each, at least three times.
    """
    taken: dict[str, list[float]] = {name: [] for name in work}
    for do in work.values():
        do()  # the first time is not like the others
    end = time.perf_counter() + seconds * len(work)
    while time.perf_counter() < end or min(map(len, taken.values())) < 3:
        for name, do in work.items():
            begin = time.perf_counter()
            do()
            taken[name].append(time.perf_counter() - begin)
    return {name: median(values) for name, values in taken.items()}


def size_of(path: Path) -> int:
    """Bytes of an ONNX file, with the weights that lie beside it."""
    return sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))


def write_companions(model: PreTrainedModel, image_processor: BaseImageProcessor, folder: Path) -> None:
    """Writes what stands beside the ONNX files: config, image processor and the script that reads them."""
    model.config.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    shutil.copy(Path(__file__).parent.parent / "templates" / SCRIPT, folder / SCRIPT)
