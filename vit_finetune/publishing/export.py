"""A classifier as an ONNX file, the same in int8, and the script that uses either without torch.

The one module of this room that loads torch: it traces the model.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from vit_finetune.run import RunError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from transformers import BaseImageProcessor, PreTrainedModel

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""What the extra `onnx` installs."""
FLOAT_FILE, INT8_FILE, SCRIPT = "model.onnx", "model_int8.onnx", "predict_onnx.py"
INPUT, OUTPUT = "pixel_values", "logits"
OPSET = 18
"""Of the ONNX operators: the one that torch translates to without converting further."""
TOLERANCE = 1e-4
"""Largest difference of a probability with which a file counts as the same model."""
INT8_METHOD = "weights per channel; inputs of convolutions by calibration, of linear layers as they come"


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

    The batch is free, height and width are the model's. Weights above 1.5 GB lie in a file beside. By torch
    itself: transformers' exporter calls the same, answers no better and is marked experimental.

    Args:
        model: in float32 on the CPU, without adapters.
        size: height and width in pixels.
        path: of the file.

    Raises:
        RunError: torch cannot translate this architecture, or what it wrote is no valid file.
    """
    import onnx

    examples = torch.zeros(2, 3, *size)  # torch takes a dimension of 1 for a fixed one
    classifier = _Logits(model).eval()  # a new module is in training mode, whatever it holds
    try:
        with torch.no_grad():
            classifier(examples)  # what LeViT computes the first time and keeps, it must not keep a trace of
            with _quiet("torch.onnx", "onnxscript"):
                program = torch.onnx.export(
                    classifier,
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
    except (torch.onnx.OnnxExporterError, onnx.checker.ValidationError) as error:
        raise RunError(
            f"{model.config.model_type} models cannot be exported with torch {version('torch')}: "
            f"{_reason(error)}. Nothing was written"
        ) from error


def _reason(error: BaseException) -> str:
    """What torch says went wrong, without the pages around it: the first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}".rstrip(": .")


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Without the warnings of these loggers: advice to who works on an exporter, not to who uses one."""
    loggers = [logging.getLogger(name) for name in names]
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
    """Writes an ONNX file with weights and inputs of convolutions and linear layers as 8-bit integers.

    Of convolutions the range of inputs is found on images beforehand. Of linear layers it is taken anew from
    every batch: what flows through a transformer has outliers, for which a range fixed once is too wide, and
    the measuring costs less than the products. Products of attention, of which neither side is a weight,
    softmax, layer norm and sums stay in float.

    Args:
        source: the file in float.
        path: of the file to write.
        batches: images to calibrate on, each float32 `(batch, 3, height, width)`.

    Raises:
        RunError: the weights lie in a file beside, from where onnxruntime 1.32 cannot quantise them.
    """
    if size_of(source) > source.stat().st_size:
        raise RunError(
            f"a model of {size_of(source) / 1e9:.1f} GB is too large for --quantize: onnxruntime quantises "
            f"what fits in one ONNX file, up to 1.5 GB. Nothing was written; export it without"
        )
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(prefix="vit-finetune-") as scratch, _quiet("root"):
        prepared, convolved = Path(scratch) / "prepared.onnx", Path(scratch) / "convolved.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            convolved,
            _Feed(batches),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        quantize_dynamic(
            convolved,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
        )


def size_of(path: Path) -> int:
    """Bytes of an ONNX file, with the weights that lie beside it."""
    return sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))


def write_companions(model: PreTrainedModel, image_processor: BaseImageProcessor, folder: Path) -> None:
    """Writes what stands beside the ONNX files: config, image processor and the script that reads them."""
    model.config.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    shutil.copy(Path(__file__).parent.parent / "templates" / SCRIPT, folder / SCRIPT)
