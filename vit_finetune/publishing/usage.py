"""The code on a model card that uses the model, with libraries that its readers have."""

from __future__ import annotations

from vit_finetune.publishing.multi_label import multi_label_reports
from vit_finetune.publishing.record import Record, hub_id
from vit_finetune.publishing.redaction import values_without_paths
from vit_finetune.run import CALIBRATION_KEY

NOWHERE = "path/to/this/folder"
"""What stands in the usage where the model has no id."""


def usage(record: Record) -> str:
    """How an image is classified, in Python."""
    name, pinned = _published(record)
    if record.is_adapter:
        return (
            "from peft import PeftModel\n"
            "from transformers import (\n    AutoConfig,\n    AutoImageProcessor,\n"
            "    AutoModelForImageClassification,\n    pipeline,\n)\n\n"
            f"{_load_adapter(record)}"
            'classifier = pipeline("image-classification", model=model, image_processor=image_processor)\n'
            f"{_classify(record, 'config')}"
        )
    return (
        "from transformers import pipeline\n\n"
        f'classifier = pipeline("image-classification", model="{name}"{pinned})\n'
        f"{_classify(record, 'classifier.model.config')}"
    )


def _classify(record: Record, config: str) -> str:
    """Lines that say what is on a photo; of several labels, those that reach their thresholds."""
    if not multi_label_reports(record):
        return 'print(classifier("photo.jpg"))'
    return (
        f"config = {config}\n"
        "thresholds = {config.id2label[n]: value for n, value in enumerate(config.thresholds)}\n"
        'answers = classifier("photo.jpg", top_k=None)\n'
        'print([found for found in answers if found["score"] >= thresholds[found["label"]]])'
    )


def calibrated_usage(record: Record) -> str:
    """How calibrated probabilities are computed, in Python."""
    name, pinned = _published(record)
    if record.is_adapter:
        loading = (
            "from peft import PeftModel\n"
            "from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification\n"
            "from transformers.image_utils import load_image\n\n"
            f"{_load_adapter(record)}"
        )
        config = "config"
    else:
        loading = (
            "from transformers import AutoImageProcessor, AutoModelForImageClassification\n"
            "from transformers.image_utils import load_image\n\n"
            f'name = "{name}"\n'
            f"model = AutoModelForImageClassification.from_pretrained(name{pinned})\n"
            f"image_processor = AutoImageProcessor.from_pretrained(name{pinned})\n"
        )
        config = "model.config"
    return (
        f"{loading}"
        # As a pipeline opens it: turned as its EXIF says.
        'inputs = image_processor(load_image("photo.jpg"), return_tensors="pt")\n'
        f"probabilities = (model(**inputs).logits / {config}.{CALIBRATION_KEY}).softmax(dim=-1)"
    )


def _published(record: Record) -> tuple[str, str]:
    """What to call the model in code, and the argument that names the branch where there is one."""
    model_id, revision = record.setting("hub", "model_id"), record.setting("hub", "revision")
    return model_id or NOWHERE, f', revision="{revision}"' if model_id and revision else ""


def _load_adapter(record: Record) -> str:
    """Lines that load LoRA's adapter beside its base: `config`, `model` and `image_processor`."""
    name, pinned = _published(record)
    base, commit = values_without_paths(record.model.get("base_model")), record.model.get("revision")
    exactly = f',\n    revision="{commit}"' if commit else ""
    return (
        f'config = AutoConfig.from_pretrained("{name}"{pinned})\n'
        "base = AutoModelForImageClassification.from_pretrained(\n"
        f'    "{hub_id(base) or base}", config=config, ignore_mismatched_sizes=True{exactly},\n)\n'
        f'model = PeftModel.from_pretrained(base, "{name}"{pinned}).merge_and_unload().eval()\n'
        f'image_processor = AutoImageProcessor.from_pretrained("{name}"{pinned})\n'
    )
