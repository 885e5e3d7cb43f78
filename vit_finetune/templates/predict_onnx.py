"""Says what is on images: python predict_onnx.py model.onnx IMAGE… (needs onnxruntime, Pillow and numpy alone)."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

CONFIG = json.loads(Path(__file__).with_name("config.json").read_text(encoding="utf-8"))
PROCESSOR = json.loads(Path(__file__).with_name("preprocessor_config.json").read_text(encoding="utf-8"))
SEVERAL_LABELS = CONFIG.get("problem_type") == "multi_label_classification"
NAMES = CONFIG.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # transformers writes all names but these


def read_pixels(file):
    """An image file as the model wants it: float32 (3, height, width), fitted and normalised."""
    image = ImageOps.exif_transpose(Image.open(file))
    if image.mode.startswith("I"):  # Pillow would turn everything above 255 white
        grey = np.asarray(image)
        if image.mode != "I" or grey.max() > 255:  # 16 bits
            grey = grey >> 8
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    size, edge = PROCESSOR["size"], PROCESSOR["size"].get("shortest_edge")
    fitted = (
        [int(edge * side / min(image.size)) for side in image.size]
        if edge
        else (size["width"], size["height"])
    )
    image = image.convert("RGB").resize(fitted, PROCESSOR["resample"])
    if PROCESSOR.get("do_center_crop"):
        width, height = PROCESSOR["crop_size"]["width"], PROCESSOR["crop_size"]["height"]
        left, top = int((image.width - width) / 2), int((image.height - height) / 2)
        image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1) * PROCESSOR["rescale_factor"]
    mean, std = np.reshape([PROCESSOR["image_mean"], PROCESSOR["image_std"]], (2, 3, 1, 1))
    return ((pixels - mean) / std).astype(np.float32)


def classify(model, pixel_values):
    """Probabilities (images, classes) of images (images, 3, height, width), by an onnxruntime session."""
    logits = model.run(["logits"], {"pixel_values": pixel_values})[0].astype(np.float64)
    if SEVERAL_LABELS:  # each has a probability of its own
        return 1 / (1 + np.exp(-logits))
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


if __name__ == "__main__":
    model = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
    for path in sys.argv[2:]:
        probabilities = classify(model, read_pixels(path)[None])[0].tolist()
        labelled = [(NAMES[str(number)], value) for number, value in enumerate(probabilities)]
        best = sorted(labelled, key=lambda pair: -pair[1])[:5]
        answer = {
            "path": path,
            "predictions": [{"label": label, "probability": value} for label, value in best],
        }
        if SEVERAL_LABELS:
            least = CONFIG.get("thresholds") or [0.5] * len(labelled)
            answer["labels"] = [label for (label, value), limit in zip(labelled, least) if value >= limit]
        print(json.dumps(answer))
