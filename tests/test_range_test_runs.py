"""Runs whose learning rate a range test found: the same as with that number, resumed, divided, and what is said."""

from __future__ import annotations

import gc
import json
import random
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import worlds
from conftest import TINY_VIT, tiny_recipe
from exactness import DROPOUT, same, weights_of
from fork_server import ForkServer
from harmed_runs import QUICK, Place, at, ended, send
from safetensors.torch import load_file
from shard_files import write_tars
from test_range_test import AUTO, MIXED, range_tested

from vit_finetune import planning
from vit_finetune.checking import check
from vit_finetune.finetuning import finetune
from vit_finetune.model.loading import load_model
from vit_finetune.publishing.card import build_card
from vit_finetune.publishing.charts import draw_range_test
from vit_finetune.recipe import ModelConfig, RecipeError, build_recipe
from vit_finetune.run import Run, RunError
from vit_finetune.training.hardware import estimate_memory
from vit_finetune.training.range_test import (
    STEPS,
    RangeTest,
)


def weights_in(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.model / "model.safetensors")


def learning_rate_of(run: Run) -> dict[str, str]:
    return next(c for c in run.read_provenance()["choices"] if c["name"] == "learning rate")


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [
        {"model": {**DROPOUT, "drop_path_rate": 0.2}, "augmentation": MIXED, "training": {"ema_decay": 0.9}},
        {"training": {"bf16": True, "dataloader_num_workers": 1, "gradient_accumulation_steps": 2}},
        {"model": {"config": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8],
                              "depths": [1, 1], "image_size": 16}}},
    ],
    ids=["everything", "bf16", "running statistics"],
)  # fmt: skip
def test_a_run_equals_one_with_the_number_written(
    folder: Path, tmp_path: Path, sections: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    sections = {**sections, "training": {**sections.get("training", {}), **AUTO}}
    run = finetune(tiny_recipe(folder, tmp_path / "auto", **sections))
    chosen = learning_rate_of(run)
    assert f"learning rate: {chosen['value']} (the middle of" in capfd.readouterr().err
    facts = run.read_provenance()["range_test"]
    assert float(chosen["value"]) == facts["chosen"] and 1e-6 < facts["chosen"] < 1
    sections["training"] = {**sections["training"], "learning_rate": float(chosen["value"])}
    written = finetune(tiny_recipe(folder, tmp_path / "written", **sections))
    assert same(weights_in(run), weights_in(written))
    for one, other in zip(*(json.loads(each.history.read_text()) for each in (run, written))):
        times = {key for key in one if key.endswith(("runtime", "per_second"))}
        assert {k: v for k, v in one.items() if k not in times} == {
            k: v for k, v in other.items() if k not in times
        }
    assert "range_test" not in written.read_provenance()
    assert 'aria-label="Training loss by learning rate' in run.report_html.read_text()
    assert f"chosen: {chosen['value']}" in run.report_html.read_text()
    assert "mathdefault" not in run.report_html.read_text()  # which is how matplotlib writes powers of ten
    assert "Range test" not in written.report_html.read_text()
    assert f"| Learning rate | {chosen['value']} (the middle of" in build_card(run)
    assert "learning_rate: auto" in run.recipe.read_text()


@pytest.mark.slow
def test_nothing_is_changed_by_the_test(folder: Path, tmp_path: Path) -> None:
    """The model, and all that draws random numbers; and the folder for its checkpoints is gone."""
    states: list[Any] = []

    def note(model: torch.nn.Module) -> None:
        states.append(weights_of(model))
        random.seed(5), np.random.seed(5)

        states.append(torch.get_rng_state())

    recipe = tiny_recipe(folder, tmp_path / "run", model=DROPOUT, augmentation=MIXED, training=AUTO)
    _, (model, _, _) = range_tested(recipe, note)
    weights, state = states
    assert same(weights_of(model), weights) and torch.get_rng_state().equal(state)
    assert all(parameter.grad is None for parameter in model.parameters())
    expected = (random.Random(5).random(), np.random.RandomState(5).random_sample())
    assert (random.random(), np.random.random_sample()) == expected
    assert not (tmp_path / "run").exists() and not list(tmp_path.rglob("checkpoint-*"))


@pytest.mark.slow
def test_off_is_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "run_range_test", None)
    run = finetune(tiny_recipe(folder, tmp_path / "run", training={"num_train_epochs": 1}))
    facts = run.read_provenance()
    assert "range_test" not in facts and not any(c["name"] == "learning rate" for c in facts["choices"])
    assert draw_range_test(None) is None


@pytest.mark.slow
def test_a_resumed_run_keeps_the_rate(forks: ForkServer, folder: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(folder, tmp_path / "killed", training={
        **AUTO, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
        "num_train_epochs": 3})  # fmt: skip
    file = tmp_path / "tiny.yaml"
    file.write_text(recipe.to_yaml(resolved=False), encoding="utf-8")
    whole = forks.start(tmp_path / "a", "train", file, f"training.output_dir={tmp_path}/whole", before=QUICK)
    assert whole.wait() == 0
    killing = QUICK + at(send(9), step=6, method="_save_checkpoint")
    killed = forks.start(tmp_path / "b", "train", file, before=killing)
    assert killed.wait() == -9 and Run(tmp_path / "killed").read_provenance()["range_test"]
    refusing = QUICK + "from vit_finetune import planning\nplanning.run_range_test = None\n"
    again = forks.start(tmp_path / "c", "train", file, "--resume", before=refusing)
    assert again.wait() == 0, again.stderr
    runs = [Run(tmp_path / name) for name in ("whole", "killed")]
    assert "(as when the run began)" in again.stderr
    assert learning_rate_of(runs[0])["value"] == learning_rate_of(runs[1])["value"]
    assert runs[0].read_provenance()["range_test"] == runs[1].read_provenance()["range_test"]
    assert same(*map(weights_in, runs))


@pytest.mark.slow
def test_stopped_in_the_test_it_leaves_nothing(forks: ForkServer, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(tiny_recipe(folder, tmp_path / "run", training=AUTO).to_yaml(resolved=False))
    child = forks.start(tmp_path / "a", "train", file, before=QUICK + at(send(15), step=50))
    assert "stopped by SIGTERM" in ended([child], [75], errors=0)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_choose_what_one_chooses(forks: ForkServer, tmp_path: Path) -> None:
    photos = worlds.draw_photos(tmp_path / "photos")
    place, facts = worlds.Place(forks, tmp_path, photos), []
    for division in (worlds.Division(1, 8, 1), worlds.Division(2, 2, 2)):
        run, children = place.start(str(division), division, "training.learning_rate=auto")
        told = worlds.finish(children)
        assert told.count("learning rate: ") == 2  # that it is tested, and what came of it
        facts.append(run.read_provenance()["range_test"])
    one, two = facts
    quiet = sum(rate < 1e-3 for rate in one["rates"])
    assert two["losses"][:quiet] == pytest.approx(one["losses"][:quiet], abs=1e-5)
    assert one["chosen"] == pytest.approx(two["chosen"], rel=0.35)  # beyond, rounding grows: some steps aside


@pytest.mark.slow
def test_a_stream_is_tested_too(folder: Path, tmp_path: Path) -> None:
    """Its test has a stream of its own: the run reads every image as if there had been none."""
    tars = write_tars(tmp_path / "shards", [12, 12, 12])
    streamed = {"data": {"streaming": True, "shuffle_buffer": 6}, "training": AUTO}
    run = finetune(tiny_recipe(tars, tmp_path / "auto", **streamed))
    streamed["training"] = {"learning_rate": run.read_provenance()["range_test"]["chosen"]}
    written = finetune(tiny_recipe(tars, tmp_path / "written", **streamed))
    assert same(weights_in(run), weights_in(written))


# --------------------------------------------------------------------------- before and beside


def test_what_cannot_go_together_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("fsdp", "deepspeed"):
        with pytest.raises(RecipeError, match=f"learning_rate=auto tests a copy.*leave out {key}"):
            tiny_recipe(folder, tmp_path, training={**AUTO, key: "full_shard"})
    with pytest.raises(RecipeError, match=r"learning_rate: found 'automatic', expected .*auto"):
        tiny_recipe(folder, tmp_path, training={"learning_rate": "automatic"})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RunError, match=r"learning_rate: auto.*FSDP.*ddp.yaml"):
        finetune(tiny_recipe(folder, tmp_path / "run", training=AUTO))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_check_says_what_it_will_do(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning, "run_range_test", None)
    facts = check(tiny_recipe(folder, tmp_path / "run", training=AUTO))
    assert (
        "learning rate: auto (a range test of 100 steps, at rates from 1e-07 to 10" in capfd.readouterr().err
    )
    assert [c["value"] for c in facts["choices"] if c["name"] == "learning rate"] == ["auto"]


def test_a_linear_probe_has_no_use_for_it(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, processor = load_model(ModelConfig(config=TINY_VIT), ["blue", "green", "red"])
    for part in (model, processor):
        part.save_pretrained(tmp_path / "saved")
    recipe = build_recipe({
        "data": {"path": str(folder)},
        "model": {"path": str(tmp_path / "saved"), "method": "linear_probe"},
        "training": {"output_dir": str(tmp_path / "run"), "use_cpu": True, **AUTO},
    })  # fmt: skip
    run = finetune(recipe)
    assert "not used by a linear probe: training.learning_rate" in capfd.readouterr().err
    assert "range_test" not in run.read_provenance()


@pytest.mark.slow
def test_the_copy_is_gone_before_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its moments and gradients, 16 bytes a weight, without waiting for the collector to come by."""
    seen, plain = [], RangeTest.__init__

    def init(self: Any, model: Any, *args: Any) -> None:
        seen.append(weakref.ref(model))
        plain(self, model, *args)

    monkeypatch.setattr(RangeTest, "__init__", init)
    gc.disable()
    try:
        range_tested(tiny_recipe(folder, tmp_path / "run", training=AUTO))
        assert [copy() for copy in seen] == [None]
    finally:
        gc.enable()


def test_its_copy_is_planned() -> None:
    """The weights once more; an average is kept later, when the copy is gone."""
    model, _ = load_model(ModelConfig(config=TINY_VIT), ["a", "b", "c"])
    weights, plain = 4 * sum(parameter.numel() for parameter in model.parameters()), estimate_memory(model)[0]
    assert estimate_memory(model, tested=True)[0] == plain + weights
    assert estimate_memory(model, averages=True, tested=True)[0] == plain + weights


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_the_test(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the recipe leaves such losses out of the log: transformers would have 0 in their place."""
    plain = RangeTest.compute_loss

    def compute(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = plain(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step >= 30 else loss

    monkeypatch.setattr(RangeTest, "compute_loss", compute)
    training = {**AUTO, "logging_nan_inf_filter": True}
    curve, _ = range_tested(tiny_recipe(folder, tmp_path / "run", training=training))
    assert len(curve.losses) == 30 and min(curve.losses) > 0


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_end_it_at_the_same_step(place: Place) -> None:
    """At the first rise of the mean of their losses; each by its own, one would wait for the other for ever."""
    early = """
from vit_finetune import planning
from vit_finetune.training import range_test
range_test.DIVERGED, planning.choose_rate = 1.0, lambda curve: 1e-3
"""
    run = Run(place.folder / "range-of-two")
    words = ("training.learning_rate=auto", "training.ddp_timeout=15")
    ended(place.train(run, *words, processes=2, before=early), [0, 0], errors=0)
    assert 1 < len(run.read_provenance()["range_test"]["losses"]) < STEPS // 2
