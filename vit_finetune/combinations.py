"""Keys of different sections that do not go together, found out before any data is touched."""

from __future__ import annotations

from vit_finetune.sections import AugmentationConfig, DataConfig, ModelConfig, Section
from vit_finetune.training_section import METRICS, MULTI_LABEL_METRICS, TrainingConfig

ONE_CLASS_ONLY = {
    "augmentation": ("mixup_alpha", "cutmix_alpha"),
    "training": ("label_smoothing_factor", "class_weights", "focal_gamma"),
}
"""Keys, by section, about classes of which an image has exactly one: `data.multi_label` refuses them."""


def check_labels(
    data: DataConfig, augmentation: AugmentationConfig, model: ModelConfig, training: TrainingConfig
) -> None:
    """Makes sure that everything goes with the number of labels that an image may have.

    Raises:
        ValueError: what does not, and what to write instead.
    """
    metric = training.metric_for_best_model
    words = MULTI_LABEL_METRICS if data.multi_label else METRICS
    if metric not in words:
        images = "may have several labels" if data.multi_label else "have one class (data.multi_label is off)"
        raise ValueError(
            f"training.metric_for_best_model: there is no {metric} where images {images}: write one of "
            f"{', '.join(words)}"
        )
    if not data.multi_label:
        return
    sections: dict[str, Section] = {"augmentation": augmentation, "training": training}
    for name, keys in ONE_CLASS_ONLY.items():
        for key in keys:
            if getattr(sections[name], key):
                off = "null" if key == "class_weights" else "0"
                raise ValueError(
                    f"{name}.{key} is about images of one class, and with data.multi_label they may have "
                    f"several labels: leave out {name}.{key}, or write {off}"
                )
    if model.method == "linear_probe":
        raise ValueError(
            "model.method=linear_probe fits a head for images of one class, and with data.multi_label they "
            "may have several labels: write model.method=head"
        )
