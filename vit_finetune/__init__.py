"""Vision Transformers, fine-tuned: one recipe takes a folder of images to an evaluated, documented model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vit_finetune.data.splits.carving import load_splits
    from vit_finetune.evaluation.prediction import predict
    from vit_finetune.evaluation.scoring import evaluate
    from vit_finetune.finetuning import finetune
    from vit_finetune.model.loading import load_model
    from vit_finetune.publishing.dataset import upload_data
    from vit_finetune.pushing import push_to_hub
    from vit_finetune.recipe import Recipe, load_recipe
    from vit_finetune.reports import MultiLabelReport
    from vit_finetune.run import Report, Run
    from vit_finetune.training.arguments import ViTTrainingArguments
    from vit_finetune.training.trainer import ViTTrainer

__version__ = "0.1.0"

_HOMES = {
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "Run": "run",
    "MultiLabelReport": "reports",
    "Report": "run",
    "finetune": "finetuning",
    "evaluate": "evaluation.scoring",
    "predict": "evaluation.prediction",
    "push_to_hub": "pushing",
    "load_splits": "data.splits.carving",
    "upload_data": "publishing.dataset",
    "load_model": "model.loading",
    "ViTTrainer": "training.trainer",
    "ViTTrainingArguments": "training.arguments",
}

__all__ = [
    "MultiLabelReport",
    "Recipe",
    "Report",
    "Run",
    "ViTTrainer",
    "ViTTrainingArguments",
    "evaluate",
    "finetune",
    "load_model",
    "load_recipe",
    "load_splits",
    "predict",
    "push_to_hub",
    "upload_data",
]


def __getattr__(name: str) -> Any:
    """Public names, imported on first use (PEP 562): torch and transformers take seconds to import."""
    if name in _HOMES:
        return getattr(import_module(f"vit_finetune.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
