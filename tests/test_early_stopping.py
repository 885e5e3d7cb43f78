"""Early stopping: training ends when validation has not become better for a while, wherever it was resumed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import tiny_recipe
from exactness import build_trainer, same, weights_of, with_and_without_a_break
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState

from vit_finetune.recipe import RecipeError, build_recipe
from vit_finetune.training.callbacks import StopEarly

LOSSES = [0.9, 0.5, 0.6, 0.55, 0.5, 0.4, 0.45, 0.42, 0.41, 0.3]


@pytest.mark.parametrize("patience", [1, 2, 3, 4])
@pytest.mark.parametrize("greater_is_better", [True, False])
def test_it_stops_where_transformers_own_stops(patience: int, greater_is_better: bool) -> None:
    scores = LOSSES if not greater_is_better else [1 - loss for loss in LOSSES]
    args: Any = SimpleNamespace(metric_for_best_model="score", greater_is_better=greater_is_better)
    ours, theirs = StopEarly(patience), EarlyStoppingCallback(patience)
    state = TrainerState()
    for score in scores:
        controls = TrainerControl(), TrainerControl()
        state.log_history.append({"eval_score": score})
        ours.on_evaluate(args, state, controls[0])
        theirs.on_evaluate(args, state, controls[1], {"eval_score": score})
        assert controls[0].should_training_stop == controls[1].should_training_stop
        better = state.best_metric is None or (score > state.best_metric) == greater_is_better
        if better and score != state.best_metric:
            state.best_metric = score
        if controls[0].should_training_stop:
            return
    assert patience == 4


def trainer_of(
    folder: Path, tmp_path: Path, name: str, callbacks: Any = None, patience: int | None = 2
) -> Any:
    """A trainer whose validation is best at the second of many evaluations."""
    recipe = tiny_recipe(
        folder, tmp_path,
        training={"num_train_epochs": 8, "early_stopping_patience": patience, "metric_for_best_model": "loss",
                  "save_total_limit": None},
    )  # fmt: skip
    trainer = build_trainer(recipe, tmp_path / name, callbacks)
    original = trainer.evaluation_loop

    def measured(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        output.metrics["eval_loss"] = abs(trainer.state.epoch - 2) + 0.1
        return output

    trainer.evaluation_loop = measured
    return trainer


@pytest.mark.slow
def test_a_run_ends_early_with_its_best_weights(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(folder, tmp_path, "run")
    trainer.train()
    assert trainer.state.epoch == 4 and trainer.state.best_global_step == 10
    other = trainer_of(folder, tmp_path, "other", patience=None)
    other.train()
    assert other.state.epoch == 8 and other.state.best_global_step == 10
    assert same(weights_of(trainer.model), weights_of(other.model))


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [12, 16])
def test_resumed_equals_uninterrupted(folder: Path, tmp_path: Path, kill_at: int) -> None:
    """Killed with one bad evaluation behind it, or none: what was counted is not forgotten."""
    whole, resumed = with_and_without_a_break(
        lambda name, callbacks=None: trainer_of(folder, tmp_path, name, callbacks), tmp_path, kill_at
    )
    assert resumed.state.global_step == whole.state.global_step == 20
    assert same(weights_of(resumed.model), weights_of(whole.model))
    # And resumed where it had ended, it ends at once.
    again = trainer_of(folder, tmp_path, "killed")
    again.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-20"))
    assert again.state.global_step == 20 and same(weights_of(again.model), weights_of(whole.model))


@pytest.mark.parametrize(
    "training",
    [
        {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False},
        {"load_best_model_at_end": False},
    ],
)
def test_it_needs_evaluations_and_their_best_weights(training: dict[str, Any]) -> None:
    values = {
        "data": {"path": "x"},
        "model": {"path": "x/y"},
        "training": {"early_stopping_patience": 2, **training},
    }
    with pytest.raises(
        RecipeError, match="early_stopping_patience ends training some evaluations after the best"
    ):
        build_recipe(values, name="early")
