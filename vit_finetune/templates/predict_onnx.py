"""Says what is on images by the model beside this file; needs onnxruntime, Pillow and numpy alone.

python predict_onnx.py photo.jpg other.png
python predict_onnx.py --model model_int8.onnx photo.jpg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent
CONFIG = json.loads((HERE / "config.json").read_text(encoding="utf-8"))
PROCESSOR = json.loads((HERE / "preprocessor_config.json").read_text(encoding="utf-8"))


def read_pixels(file: Any) -> np.ndarray:
    """An image file as the model wants it: float32 `(3, height, width)`, normalised."""
    image = ImageOps.exif_transpose(Image.open(file))
    if image.mode.startswith("I"):  # more than 8 bits a pixel: the upper 8 of 16
        grey = np.asarray(image)
        image = Image.fromarray((grey >> 8 if grey.max() > 255 else grey).clip(0, 255).astype(np.uint8))
    image = (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
    size, edge = PROCESSOR["size"], PROCESSOR["size"].get("shortest_edge")
    short = min(image.size)
    wanted = [int(edge * side / short) for side in image.size] if edge else [size["width"], size["height"]]
    image = image.resize((wanted[0], wanted[1]), PROCESSOR["resample"])
    if PROCESSOR.get("do_center_crop"):
        width, height = PROCESSOR["crop_size"]["width"], PROCESSOR["crop_size"]["height"]
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1) * PROCESSOR["rescale_factor"]  # (3, H, W)
    mean, std = (np.reshape(PROCESSOR[name], (3, 1, 1)) for name in ("image_mean", "image_std"))
    values: np.ndarray = ((pixels - mean) / std).astype(np.float32)
    return values


def classify(session: onnxruntime.InferenceSession, pixel_values: np.ndarray) -> np.ndarray:
    """Probabilities `(images, classes)` of images `(images, 3, height, width)`."""
    logits = session.run(["logits"], {"pixel_values": pixel_values})[0].astype(np.float64)
    if CONFIG["problem_type"] == "multi_label_classification":  # of each label its own
        return np.asarray(1 / (1 + np.exp(-logits)))
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


def describe(probabilities: np.ndarray, top: int = 5) -> dict[str, Any]:
    """The most probable classes; of several labels also those that reach their thresholds."""
    names = [CONFIG["id2label"][str(number)] for number in range(len(probabilities))]
    best = np.argsort(-probabilities, kind="stable")[:top]
    found = [{"label": names[number], "probability": float(probabilities[number])} for number in best]
    if CONFIG["problem_type"] != "multi_label_classification":
        return {"predictions": found}
    thresholds = CONFIG.get("thresholds") or [0.5] * len(names)
    rows = zip(names, probabilities, thresholds)
    return {"predictions": found, "labels": [name for name, value, least in rows if value >= least]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Says what is on images, one line of JSON for each.")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--model", default="model.onnx", help="model.onnx or model_int8.onnx")
    words = parser.parse_args()
    model = onnxruntime.InferenceSession(HERE / words.model, providers=["CPUExecutionProvider"])
    for path in words.images:
        probabilities = classify(model, read_pixels(path)[None])[0]
        print(json.dumps({"path": path} | describe(probabilities)))
