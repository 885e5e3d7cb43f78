"""LoRA where something is amiss: checkpoints that go, adapters of strangers, kills; and all techniques together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from conftest import Say, tiny_recipe
from exactness import EVERY_SECOND
from fork_server import QUICK, ForkServer
from harmed_runs import at, send
from safetensors.torch import load_file, save_file
from test_distillation import OTHER, write_teacher
from test_lora import LABELS, drawn, load, lora_recipe

from vit_finetune.finetuning import finetune
from vit_finetune.model.loading import load_checkpoint, load_model
from vit_finetune.model.lora import SETTINGS, WEIGHTS, merge_lora, save_adapter
from vit_finetune.recipe import ModelConfig
from vit_finetune.run import Run, RunError
from vit_finetune.training.trainer import ViTTrainer

if TYPE_CHECKING:
    from loopback_hub import LoopbackHub


@pytest.mark.slow
def test_the_checkpoint_may_go_while_training(
    folder: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which weights an adapter belongs beside is what they were when they were loaded."""
    runs = []
    for name, goes in (("stays", False), ("goes", True)):
        base = shutil.copytree(pretrained, tmp_path / name / "base")
        plain = ViTTrainer.training_step

        def step(
            self: Any, *args: Any, plain: Any = plain, base: Path | None = base if goes else None
        ) -> Any:
            if base and base.is_dir():
                shutil.rmtree(base)
            return plain(self, *args)

        monkeypatch.setattr(ViTTrainer, "training_step", step)
        runs.append(finetune(lora_recipe(folder, base, tmp_path / name / "run")))
        monkeypatch.undo()
    assert not (tmp_path / "goes" / "base").exists()
    one, other = ((run.adapter / WEIGHTS).read_bytes() for run in runs)  # what it stands beside is in them
    assert one == other


def written_adapter(pretrained: Path, path: Path) -> dict[str, Any]:
    """An adapter as `lora_merge: false` publishes it; answers its settings."""
    model = load(pretrained)
    save_adapter(model, path)
    model.config.save_pretrained(path)
    shutil.copy(pretrained / "preprocessor_config.json", path)
    settings: dict[str, Any] = json.loads((path / SETTINGS).read_text())
    return settings


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"base_model_name_or_path": None}, "not the settings of a LoRA adapter of a checkpoint"),
        ({"base_model_name_or_path": "gone/away/base"}, "is an adapter to gone/away/base: .*no such model folder"),
        ({"r": 10**7}, "LORA of rank 10000000, which its weights are not"),  # gigabytes, if it were believed
        ({"r": "4"}, "of rank '4'"),
        ({"peft_type": "LOHA"}, "LOHA of rank 4, which its weights are not"),
        ({"use_rslora": True}, "use_rslora is True, which is not read here"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern is .*, which is not read here"),
        ({"target_modules": None}, "not the settings of a LoRA adapter"),
        ({"target_modules": "all-linear"}, "matches no layer"),
    ],
)  # fmt: skip
def test_settings_that_are_not_ours_are_refused(
    pretrained: Path, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    settings = written_adapter(pretrained, tmp_path)
    load_checkpoint(str(tmp_path))
    (tmp_path / SETTINGS).write_text(json.dumps(settings | change))
    with pytest.raises(RunError, match=told):
        load_checkpoint(str(tmp_path))


def test_weights_that_are_damaged_or_not_there_are_refused(pretrained: Path, tmp_path: Path) -> None:
    written_adapter(pretrained, tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match="adapter's weights cannot be read"):
        load_checkpoint(str(tmp_path))
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(RunError, match="adapter's weights cannot be read"):
        load_checkpoint(str(tmp_path))
    (tmp_path / SETTINGS).write_text("[]")
    (tmp_path / WEIGHTS).write_bytes(whole)
    with pytest.raises(RunError, match="not the settings of a LoRA adapter"):
        load_checkpoint(str(tmp_path))


def test_convolutions_are_merged_and_those_of_groups_refused(tmp_path: Path) -> None:
    """Beside those of groups PEFT trains, and finds only at the end that it cannot merge."""
    config = {"model_type": "convnext", "hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2, "patch_size": 2, "image_size": 16}  # fmt: skip
    for part in load_model(ModelConfig(config=config), LABELS):
        part.save_pretrained(tmp_path)
    with pytest.raises(RunError, match=r"'dwconv' is a convolution of groups.*leave it out"):
        load(tmp_path, lora_targets=["pwconv1", "dwconv"])
    with pytest.raises(RunError, match=r"'fc1' matches no layer.*expected some of patch_embeddings, pwconv1"):
        load(tmp_path, lora_targets=["fc1"])
    model = load(tmp_path, lora_targets=["pwconv1", "patch_embeddings"])
    drawn(model)
    images = torch.randn(5, 3, 16, 16)
    expected = model.eval()(images).logits
    assert not torch.allclose(
        load(tmp_path, lora_targets=["pwconv1"]).eval()(images).logits, expected, atol=1e-3
    )
    merge_lora(model)
    torch.testing.assert_close(model(images).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.hub
def test_a_resumed_run_asks_the_commit_that_it_began_with(
    hub: LoopbackHub, say: Say, run: Run, folder: Path, tmp_path: Path
) -> None:
    """The branch has gone on to other weights, beside which the adapter would mean nothing."""
    assert say("push", run.path, "--repo", "ann/base", "--verify", "files")[0] == 0
    commit = hub.repo("ann/base").commits()[0].id
    file = tmp_path / "adapter.yaml"
    values = tiny_recipe(folder, tmp_path / "adapter").model_dump(mode="json", exclude_unset=True)
    file.write_text(yaml.safe_dump(values | {"model": {"path": "ann/base", "method": "lora"}}))
    code, _, told = say("train", file)
    assert code == 0, told
    adapter = Run(tmp_path / "adapter")
    before = (adapter.model / "model.safetensors").read_bytes()
    weights = load_file(run.model / "model.safetensors")
    weights["classifier.bias"] += 1
    save_file(weights, run.model / "model.safetensors", metadata={"format": "pt"})
    assert say("push", run.path, "--repo", "ann/base", "--verify", "files", "--force")[0] == 0
    assert hub.repo("ann/base").commits()[0].id != commit
    adapter.report_html.unlink()
    code, _, told = say("train", file, "--resume")
    assert code == 0, told
    assert adapter.read_provenance()["model"]["revision"] == commit
    assert (adapter.model / "model.safetensors").read_bytes() == before


KILLED = """
import os
from vit_finetune import finetuning
plain = finetuning.{what}
def killed(*args, **kwargs):
    plain(*args, **kwargs)
    if str(args[0]).endswith("{ending}"):
        os.kill(os.getpid(), 9)
finetuning.{what} = killed
"""
"""Source with which a process is killed behind a function of `finetuning`."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "ending"), [("save_adapter", ""), ("merge_lora", ""), ("shutil.rmtree", "/model")]
)
def test_killed_while_it_is_written_the_model_is_written_again(
    forks: ForkServer, folder: Path, pretrained: Path, tmp_path: Path, what: str, ending: str
) -> None:
    """In the adapter, between it and the model, and where the model that is replaced is gone."""
    file = tmp_path / "tiny.yaml"
    recipe = lora_recipe(folder, pretrained, tmp_path / "whole", training={"ema_decay": 0.8})
    file.write_text(recipe.to_yaml(resolved=False), encoding="utf-8")
    whole = forks.start(tmp_path / "a", "train", file, before=QUICK)
    assert whole.wait() == 0, whole.stderr
    words = ("train", file, f"training.output_dir={tmp_path}/killed")
    scored = forks.start(tmp_path / "b", *words, before=QUICK + KILLED.format(what="score_splits", ending=""))
    assert scored.wait() == -9
    run = Run(tmp_path / "killed")
    assert run.model.is_dir() and run.adapter.is_dir()
    killing = QUICK + KILLED.format(what=what, ending=ending)
    child = forks.start(tmp_path / "c", *words, "--resume", before=killing)
    assert child.wait() == -9, child.stderr
    done = forks.start(tmp_path / "d", *words, "--resume", before=QUICK)
    assert done.wait() == 0, done.stderr
    for part in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (run.path / part).read_bytes() == (tmp_path / "whole" / part).read_bytes()
    assert not [path for path in run.path.iterdir() if path.name.startswith(".")]


# --------------------------------------------------------------------------- all together


@pytest.mark.slow
def test_all_techniques_together_go_on_where_they_were_killed(
    forks: ForkServer, folder: Path, pretrained: Path, tmp_path: Path
) -> None:
    """The rate of a range test, a teacher, an average, mixed and repeated images, dropped paths, a temperature."""
    teacher = write_teacher(tmp_path / "teacher", ["red", "blue", "green"], 24, **OTHER)
    recipe = lora_recipe(
        folder, pretrained, tmp_path / "whole", model={"drop_path_rate": 0.2},
        augmentation={"policy": "threeaugment", "mixup_alpha": 0.8, "cutmix_alpha": 1.0, "repeats": 3},
        training={
            **EVERY_SECOND, "learning_rate": "auto", "teacher": str(teacher), "ema_decay": 0.9,
            "layer_decay": 0.7, "head_lr_multiplier": 10.0, "gradient_accumulation_steps": 2, "bf16": True,
            "num_train_epochs": 4, "early_stopping_patience": 5, "gradient_checkpointing": True,
        },
        evaluation={"calibrate": True},
    )  # fmt: skip
    file = tmp_path / "tiny.yaml"
    file.write_text(recipe.to_yaml(resolved=False), encoding="utf-8")
    killed = f"training.output_dir={tmp_path}/killed"
    # So few images tell no rate.
    chosen = "from vit_finetune import planning\nplanning.choose_rate = lambda curve: 1e-2\n"
    for name, words, before, code in (
        ("a", [], "", 0),
        ("b", [killed], at(send(9), step=6, method="_save_checkpoint"), -9),
        ("c", [killed, "--resume"], "", 0),
    ):
        child = forks.start(tmp_path / name, "train", file, *words, before=QUICK + chosen + before)
        assert child.wait() == code, child.stderr
    whole, again = Run(tmp_path / "whole"), Run(tmp_path / "killed")
    for part in ("model/model.safetensors", "adapter/adapter_model.safetensors", "model/config.json",
                 "reports/test.json"):  # fmt: skip
        assert (again.path / part).read_bytes() == (whole.path / part).read_bytes()
    assert again.read_provenance()["range_test"] == whole.read_provenance()["range_test"]
