"""The verbs as a user says them: words, exit codes, what goes to stdout, and one whole run."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import COLOURS, TINY_VIT, draw_folder, draw_image
from typer.testing import CliRunner, Result

import vit_finetune
from vit_finetune.cli import app
from vit_finetune.run import Findings

RUN_FILES = {
    "recipe.yaml",
    "provenance.json",
    "findings.json",
    "history.json",
    "seeing.json",
    "report.html",
    "splits/train.csv",
    "splits/validation.csv",
    "splits/test.csv",
    "model/config.json",
    "model/model.safetensors",
    "model/preprocessor_config.json",
    "model/README.md",
    "reports/validation.json",
    "reports/test.json",
    "predictions/test.parquet",
}
"""A run folder, but for checkpoints and pictures, whose number depends on the run."""


def say(*words: object) -> Result:
    """The command line in this process."""
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="vit-finetune")


def call(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "vit_finetune", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def write_recipe(path: Path, data: Path, output_dir: Path, **training: Any) -> Path:
    """A recipe file that trains a tiny ViT in seconds."""
    sections = {
        # What measuring chooses may differ from run to run where models are tiny.
        "data": {"path": str(data), "validation_fraction": 0.25, "test_fraction": 0.25, "cache": "off"},
        "model": {"config": TINY_VIT},
        "training": {
            "output_dir": str(output_dir),
            "bf16": False,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-3,
            "use_cpu": True,
            **training,
        },
    }
    path.write_text("# A tiny model.\n" + yaml.safe_dump(sections), encoding="utf-8")
    return path


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["evaluate", "--help"], []])
def test_help_is_plain_and_names_the_verbs(words: list[str]) -> None:
    done = say(*words)
    assert done.exit_code == (0 if words else 2)
    shown = done.stdout + done.stderr
    assert "Usage: vit-finetune" in shown
    assert "╭" not in shown
    if words in ([], ["--help"]):
        for verb in ("check", "train", "evaluate", "predict", "recipes"):
            assert f"\n  {verb} " in shown


def test_module_and_script_are_the_same_command() -> None:
    script = shutil.which("vit-finetune", path=str(Path(sys.executable).parent))
    assert script, "the package is not installed"
    told = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert told.stdout == call("--version").stdout == f"{vit_finetune.__version__}\n"
    assert told.stderr == ""


def test_recipes_are_listed_with_their_first_line_on_stdout() -> None:
    done = call("recipes")
    assert (done.returncode, done.stderr) == (0, "")
    assert "digits               scikit-learn's 1,797 handwritten digits" in done.stdout
    assert len(done.stdout.splitlines()) == len(vit_finetune.recipe.bundled_recipes())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "digits", "training.learning_rat=1"], "did you mean training.learning_rate?"),
        (["check", "nowhere.yaml"], "nowhere.yaml: no such recipe file"),
        (["train", "digits", "training.seed"], "an override is written key.path=value"),
        (["train"], "Missing argument 'RECIPE'"),
        (["train", "digits", "--resum"], "No such option: --resum"),
        (["trian", "digits"], "No such command 'trian'"),
        (["predict", "somewhere"], "Missing argument 'IMAGE|FOLDER'"),
        (["predict", "a", "b", "--top", "0"], "--top"),
    ],
)
def test_wrong_words_and_recipes_exit_with_2(words: list[str], said: str) -> None:
    done = say(*words)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_where_an_error_came_from(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "a").touch()
    words = ["train", "digits", f"training.output_dir={tmp_path / 'used'}"]
    quiet, loud = call(*words), call(*words, "--debug")
    assert quiet.returncode == loud.returncode == 1
    assert quiet.stderr.startswith(f"error: {tmp_path / 'used'} is not empty")
    assert "Traceback" not in quiet.stderr
    assert "Traceback" in loud.stderr
    assert "check_free" in loud.stderr


@pytest.mark.parametrize(
    ("stop", "code", "said"), [("Interrupted", 130, "stopped at 3"), ("Break", 130, "stopped")]
)
def test_ctrl_c_exits_with_130(stop: str, code: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vit_finetune.run import Interrupted, Run

    def interrupt(*_: object) -> None:
        raise Interrupted("stopped at 3") if stop == "Interrupted" else KeyboardInterrupt

    monkeypatch.setattr(Run, "check_free", interrupt)
    done = say("train", "digits")
    assert done.exit_code == code
    assert said in done.stderr


def test_a_full_disk_names_the_file_and_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from vit_finetune.run import Run

    def fill(*_: object) -> None:
        raise OSError(28, "No space left on device", "/data/run/a.json")

    monkeypatch.setattr(Run, "check_free", fill)
    done = say("train", "digits")
    assert done.exit_code == 1
    assert done.stderr == (
        "error: the disk is full (/data/run/a.json). Free some space and say the same again; `train` goes on with "
        "--resume\n"
    )


def test_an_unforeseen_error_is_one_line_with_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    from vit_finetune.run import Run

    def stumble(*_: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(Run, "check_free", stumble)
    done = say("train", "digits")
    assert done.exit_code == 1
    assert done.stderr == "error: ZeroDivisionError: by zero (--debug shows where)\n"


def test_check_looks_at_everything_and_writes_nothing_but_the_checkup(folder: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml", folder, tmp_path / "run")
    before = files_below(folder)
    done = say("check", recipe, "--json")
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["labels"] == ["blue", "green", "red"]
    assert facts["splits"] == {"train": 18, "validation": 9, "test": 9}
    assert facts["batch_shape"] == [4, 3, 16, 16]
    assert facts["tokens"] == 17
    assert facts["images_per_step"] == 4
    assert facts["steps"] == 10
    assert "18" in done.stderr
    assert "1 process × 4 images × 1 accumulation = 4 images per step" in done.stderr
    assert not (tmp_path / "run").exists()
    assert files_below(folder) == before
    assert files_below(tmp_path / "run-checkup").keys() == {"findings.json", "checkup.html"}
    assert facts["findings"] == [] and "stops" not in facts
    assert say("check", recipe, "--output", tmp_path / "there").stdout == ""
    assert Findings.load(tmp_path / "there" / "findings.json").num_images == {"all": 36}


def test_check_of_data_that_training_would_refuse_tells_everything_and_fails(
    folder: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml", folder, tmp_path / "run")
    (folder / "red" / "empty.png").touch()
    (folder / "red" / "copy.png").write_bytes((folder / "red" / "1.png").read_bytes())
    done = say("check", recipe, "--json")
    assert done.exit_code == 1
    facts = json.loads(done.stdout)
    assert [(f["severity"], f["kind"]) for f in facts["findings"]] == [
        ("error", "unreadable"),
        ("warning", "duplicate"),
    ]
    assert f"error: {facts['stops']}\n" in done.stderr and "red/empty.png: 0 bytes" in facts["stops"]
    assert "duplicate" in done.stderr
    written = Findings.load(tmp_path / "run-checkup" / "findings.json")
    assert [finding.kind for finding in written.findings] == ["unreadable", "duplicate"]
    # What the checkup excludes makes the data fit to train on.
    for _ in range(2):
        again = say("check", recipe, f"data.exclude={tmp_path / 'run-checkup' / 'findings.json'}", "--json")
        assert again.exit_code == 0, again.stderr
        assert [f["kind"] for f in json.loads(again.stdout)["findings"]] == ["excluded"]


# --------------------------------------------------------------------------- one whole run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with photos/, tiny.yaml and the finished run/ that every test below looks at."""
    root = tmp_path_factory.mktemp("trained")
    draw_folder(root / "photos")
    write_recipe(root / "tiny.yaml", root / "photos", root / "run")
    done = call("train", root / "tiny.yaml", "training.seed=3", VIT_FINETUNE_CACHE=str(root / "cache"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "", "everything for people goes to stderr"
    (root / "said").write_text(done.stderr)
    return root


@pytest.mark.slow
def test_train_leaves_exactly_the_run_folder(trained: Path) -> None:
    found = set(files_below(trained / "run"))
    known = {name for name in found if not name.startswith(("checkpoints/", "pictures/"))}
    assert known == RUN_FILES
    assert "pictures/augmented.jpg" in found
    mistakes = json.loads((trained / "run/reports/test.json").read_text())["worst_mistakes"]
    pictures = {name for name in found if name.startswith("pictures/mistake-")}
    assert pictures == {f"pictures/{mistake[kind]}" for mistake in mistakes for kind in ("picture", "map")}
    assert {name.split("/")[1] for name in found if name.startswith("checkpoints/")} <= {
        "checkpoint-5",
        "checkpoint-10",
    }
    assert {path.name for path in trained.iterdir()} == {"photos", "tiny.yaml", "run", "cache", "said"}


@pytest.mark.slow
def test_train_says_where_the_report_is_and_keeps_the_command(trained: Path) -> None:
    said = (trained / "said").read_text()
    assert f"report: {trained / 'run/report.html'}" in said
    assert f"model:  {trained / 'run/model'}" in said
    facts = json.loads((trained / "run/provenance.json").read_text())
    assert facts["command"] == f"vit-finetune train {trained / 'tiny.yaml'} training.seed=3"
    assert facts["seed"] == 3
    assert yaml.safe_load((trained / "run/recipe.yaml").read_text())["training"]["seed"] == 3
    assert facts["train_seconds"] > 0


def scores(report: dict[str, Any]) -> dict[str, Any]:
    """What a report says of the split as a whole: all but the names of single images."""
    return {name: value for name, value in report.items() if name not in ("worst_mistakes", "split")}


def close(found: Any, expected: Any) -> bool:
    """Equal but for the last digits of numbers, however deep."""
    match expected:
        case dict():
            return found.keys() == expected.keys() and all(close(found[k], v) for k, v in expected.items())
        case list():
            return len(found) == len(expected) and all(map(close, found, expected))
        case float():
            return bool(found == pytest.approx(expected, abs=1e-6))
    return bool(found == expected)


@pytest.mark.slow
def test_evaluate_repeats_the_report_of_the_run(trained: Path) -> None:
    before = files_below(trained / "run")
    expected = json.loads((trained / "run/reports/test.json").read_text())
    done = say("evaluate", trained / "run", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["split"] == "test"
    assert close(scores(found), scores(expected))
    assert [mistake["id"] for mistake in found["worst_mistakes"]] == [
        m["id"] for m in expected["worst_mistakes"]
    ]
    shown = say("evaluate", trained / "run", "--split", "validation")
    assert shown.stdout == ""
    assert "balanced accuracy" in shown.stderr
    assert files_below(trained / "run") == before


@pytest.mark.slow
def test_evaluate_scores_the_model_folder_on_the_same_images_the_same(trained: Path, tmp_path: Path) -> None:
    with (trained / "run/splits/test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        (tmp_path / "again" / row["label"]).mkdir(parents=True, exist_ok=True)
        shutil.copy(trained / "photos" / row["id"], tmp_path / "again" / row["id"])
    done = say("evaluate", trained / "run/model", "--data", tmp_path / "again", "--json")
    assert done.exit_code == 0, done.stderr
    expected = json.loads((trained / "run/reports/test.json").read_text())
    assert expected["num_images"] == len(rows) == 9
    assert close(scores(json.loads(done.stdout)), scores(expected))


@pytest.mark.slow
def test_evaluate_refuses_other_classes_by_name(trained: Path, tmp_path: Path) -> None:
    for name in ("blue", "purple"):
        (tmp_path / "other" / name).mkdir(parents=True)
        draw_image(COLOURS["blue"], 1).save(tmp_path / "other" / name / "a.png")
    done = say("evaluate", trained / "run/model", "--data", tmp_path / "other", "--json")
    assert (done.exit_code, done.stdout) == (1, "")
    for name in ("purple", "green", "red"):
        assert name in done.stderr
    assert say("evaluate", trained / "run/model").exit_code == 1
    wrong = say("evaluate", trained / "run", "--split", "tset")
    assert wrong.exit_code == 1
    assert "there is no split 'tset'; found train, validation, test" in wrong.stderr


@pytest.mark.slow
def test_predict_takes_files_and_folders(trained: Path, tmp_path: Path) -> None:
    one = trained / "photos/red/0.png"
    done = say("predict", trained / "run", one, trained / "photos/blue", "--top", "2", "--json")
    assert done.exit_code == 0, done.stderr
    answers = json.loads(done.stdout)
    assert len(answers) == 13
    assert answers[0]["path"] == str(one)
    for answer in answers:
        first, second = answer["predictions"]
        assert 1 >= first["probability"] >= second["probability"] >= 0
        assert {first["label"], second["label"]} < {"blue", "green", "red"}
    plain = say("predict", trained / "run/model", one)
    label, probability = answers[0]["predictions"][0].values()
    assert plain.stdout.startswith(f"{one}: {label} {probability:.3f}, ")
    missing = say("predict", trained / "run", tmp_path / "nothing.png", "--json")
    assert (missing.exit_code, missing.stdout) == (1, "")
    assert missing.stderr == f"error: {tmp_path / 'nothing.png'}: no such file or folder\n"


@pytest.mark.slow
def test_train_again_is_refused_and_resume_of_a_finished_run_keeps_it(trained: Path) -> None:
    before = files_below(trained / "run")
    again = call("train", trained / "tiny.yaml", "training.seed=3")
    assert again.returncode == 1
    assert again.stderr.startswith(f"error: {trained / 'run'} already holds a run. Continue it with --resume")
    assert files_below(trained / "run") == before
    other = say("train", trained / "tiny.yaml", "--resume")
    assert other.exit_code == 1
    assert "training.seed was 3, is 42" in other.stderr
    assert files_below(trained / "run") == before
    done = call("train", trained / "tiny.yaml", "training.seed=3", "--resume")
    assert done.returncode == 0, done.stderr
    after = files_below(trained / "run")
    assert set(after) == set(before)
    for name in (
        "model/model.safetensors",
        "model/config.json",
        "recipe.yaml",
        "splits/test.csv",
        "reports/test.json",
    ):
        assert after[name] == before[name], name
    old, new = json.loads(before["provenance.json"]), json.loads(after["provenance.json"])
    assert new["created"] == old["created"]
    assert (new["steps"], new["best_step"]) == (old["steps"], old["best_step"])


@pytest.mark.slow
def test_the_recipe_in_a_run_folder_trains_the_same_model(trained: Path, tmp_path: Path) -> None:
    done = call("train", trained / "run/recipe.yaml", f"training.output_dir={tmp_path / 'again'}")
    assert done.returncode == 0, done.stderr
    name = "model/model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (trained / "run" / name).read_bytes()
    assert "warning" not in done.stderr.lower()
