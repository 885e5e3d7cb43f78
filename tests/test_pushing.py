"""A model to the Hub: what is published is what was scored, whatever happens on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import Say, draw_folder, tiny_recipe
from fork_server import IMPATIENT, QUICK
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub

from vit_finetune.finetuning import finetune
from vit_finetune.run import Report, Run

pytestmark = [pytest.mark.hub, pytest.mark.slow]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run; tests change copies of it."""
    folder = tmp_path_factory.mktemp("pushed")
    draw_folder(folder / "photos")
    return finetune(tiny_recipe(folder / "photos", folder / "run", hub={"license": "apache-2.0"}))


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    """A copy of the finished run."""
    shutil.copytree(trained.path, tmp_path / "run")
    return Run(tmp_path / "run")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def forget_all(hub: LoopbackHub) -> None:
    """Takes away every repository, and the large files that a Hub keeps beside them."""
    hub.store.repos.clear()
    for file in hub.store.objects.folder.iterdir():
        if file.is_file():
            file.unlink()


def test_what_is_published_is_what_was_scored(hub: LoopbackHub, say: Say, run: Run, tmp_path: Path) -> None:
    before = contents(run.path)
    code, _, said = say("push", run.path, "--repo", "ann/colours", "--tag", "v1", "--verify", "full")
    assert code == 0 and "verified: downloaded into an empty cache" in said and "9 of 9 test images" in said
    repo = hub.repo("ann/colours")
    assert [commit.title for commit in repo.commits()] == ["Upload run with vit-finetune", "initial commit"]
    assert repo.tags["v1"].id == repo.commits()[0].id
    files = repo.files()
    assert {name: files[name] for name in files if name not in (".gitattributes", "README.md")} == {
        path.name: path.read_bytes() for path in run.model.iterdir() if path.name != "README.md"
    }
    card, report = ModelCard(files["README.md"].decode()), Report.load(run.report("test"))
    scores = {result.metric_type: result.metric_value for result in card.data.eval_results or []}
    assert scores["accuracy"] == report.accuracy and scores["f1"] == report.macro_f1
    assert scores["log_loss"] == report.log_loss and scores["ece"] == report.ece
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-classification")
    assert card.data.license == "apache-2.0" and 'model="ann/colours"' in card.text
    assert str(tmp_path) not in files["README.md"].decode()
    # Said again, nothing is sent and nothing is committed.
    code, _, said = say("push", run.path, "--repo", "ann/colours", "--tag", "v1", "--verify", "files")
    assert code == 0 and "it held these files already" in said and len(repo.commits()) == 2
    assert contents(run.path) == before
    # By its id, at a revision.
    photos = run.path.parent / "new"
    draw_folder(photos)
    code, out, said = say("evaluate", "ann/colours@v1", "--data", photos, "--json")
    assert code == 0 and json.loads(out)["num_images"] == 36, said
    code, out, said = say("predict", "ann/colours", photos / "red", "--json")
    assert code == 0 and len(json.loads(out)) == 12, said


def test_training_publishes_at_its_end(hub: LoopbackHub, say: Say, tmp_path: Path) -> None:
    draw_folder(tmp_path / "photos")
    hub_section = {"push": True, "model_id": "ann/colours", "private": True, "license": "mit"}
    recipe = tiny_recipe(tmp_path / "photos", tmp_path / "trained", hub=hub_section)
    file = tmp_path / "colours.yaml"
    file.write_text(recipe.to_yaml(resolved=False))
    code, _, said = say("train", file, user="eve")
    assert code == 1 and "may not make repositories for ann" in said and not (tmp_path / "trained").exists()
    code, _, said = say("train", file)
    assert code == 0 and "verified: " in said and hub.repo("ann/colours").private
    code, _, said = say("train", file, "--resume")
    assert code == 0 and "it held these files already" in said


def test_killed_at_any_point_it_is_completed(hub: LoopbackHub, say: Say, run: Run) -> None:
    words = ("push", run.path, "--repo", "ann/colours", "--tag", "v1", "--verify", "files")
    before = contents(run.path)
    assert say(*words, before=IMPATIENT)[0] == 0
    expected, total = hub.repo("ann/colours").files(), len(hub.requests)
    assert total > 10
    for die in ("before", "after"):
        for number in range(0, total, 2 if die == "before" else 3):
            forget_all(hub)
            hub.faults.clear()
            hub.fault(".*", ".*", skip=number, die=die)  # type: ignore[arg-type]
            code, _, said = say(*words, before=IMPATIENT)
            assert code == 1 and said.count("error:") == 1, (die, number, said)
            hub.faults.clear()
            hub.start()
            code, _, said = say(*words, before=IMPATIENT)
            assert code == 0, (die, number, said)
            repo = hub.repo("ann/colours")
            assert [c.title for c in repo.commits()] == ["Upload run with vit-finetune", "initial commit"]
            assert repo.files() == expected and repo.tags["v1"].id == repo.commits()[0].id
    assert contents(run.path) == before


def test_what_may_not_be_published(hub: LoopbackHub, say: Say, run: Run) -> None:
    hub.create("ann/data", kind="dataset")
    hub.create("ann/words", files={"model.bin": b"words", "config.json": b"{}"})
    hub.create("bob/model")
    for repo, expected in {
        "bob/new": "may not make repositories for bob",
        "bob/model": "may not write to it",
        "ann/-x": "no name that the Hub takes",
        "alone": "write ann/alone",
        "ann/data": "is a dataset on the Hub, and no model",
        "ann/words": "holds something else already",
    }.items():
        code, _, said = say("push", run.path, "--repo", repo, before=QUICK)
        assert code == 1 and expected in said and said.count("error:") == 1, said
    code, _, said = say("push", run.path, "--repo", "ann/colours", user=None)
    assert code == 1 and "not logged in" in said
    code, _, said = say("push", run.path, "--repo", "ann/colours", HF_TOKEN=hub.token("ann", "read"))
    assert code == 1 and "may only read" in said
    hub.fault("GET", "whoami", status=429, headers={"Retry-After": "900"})
    code, _, said = say("push", run.path, "--repo", "ann/colours")
    assert code == 1 and "limits how often" in said and "900 seconds" in said
    hub.kill()
    code, _, said = say("push", run.path, "--repo", "ann/colours", before=IMPATIENT)
    assert code == 1 and "cannot be reached" in said
    hub.start()
    assert ("model", "ann/colours") not in hub.store.repos


def test_files_edited_after_scoring_are_refused(hub: LoopbackHub, say: Say, run: Run) -> None:
    config = json.loads((run.model / "config.json").read_text())
    (run.model / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.3}))
    code, _, said = say("push", run.path, "--repo", "ann/colours")
    assert code == 1 and "model/config.json is not what was there after scoring" in said
    code, _, said = say("push", run.path, "--repo", "ann/colours", "--force")
    assert (
        code == 1 and "does not score as reported" in said
    )  # published, as was asked for, and said to be wrong
    assert "**Changed after scoring: config.json.**" in hub.repo("ann/colours").files()["README.md"].decode()


def test_a_branch_and_a_pull_request(hub: LoopbackHub, say: Say, run: Run) -> None:
    """Both are said twice; the second time nothing is there to do."""
    theirs = (run.model / "README.md").read_text(encoding="utf-8") + "\nMy own words.\n"
    (run.model / "README.md").write_text(
        theirs.replace("license: apache-2.0", "language: en"), encoding="utf-8"
    )
    for times in range(2):
        words = ("--repo", "ann/colours", "--revision", "dev/x", "--verify", "files")
        code, _, said = say("push", run.path, *words)
        assert code == 0 and ("held these files already" in said) == bool(times), said
    repo = hub.repo("ann/colours")
    assert len(repo.commits("dev/x")) == 2 and len(repo.commits()) == 1
    card = ModelCard(repo.files("dev/x")["README.md"].decode())
    assert "My own words." in card.text and card.data.license == "apache-2.0"
    assert card.data.to_dict()["language"] == "en" and card.data.eval_results
    for times in range(2):
        words = ("--repo", "ann/colours", "--create-pr", "--verify", "files")
        code, _, said = say("push", run.path, *words, user="bob")
        assert code == 0 and ("held these files already" in said) == bool(times), said
        assert "/discussions/1" in said
    assert len(repo.commits("refs/pr/1")) == 2 and len(repo.commits()) == 1


def test_a_run_that_was_not_tested_is_refused(say: Say, run: Run) -> None:
    run.report("test").unlink()
    code, _, said = say("push", run.path, "--repo", "ann/colours")
    assert code == 1 and "there is no test report" in said


def test_a_dry_run_shows_and_sends_nothing(hub: LoopbackHub, say: Say, run: Run) -> None:
    code, out, said = say("push", run.path, "--repo", "ann/colours", "--dry-run")
    assert code == 0 and "model.safetensors" in out and "model-index:" in out and "nothing was sent" in said
    assert not hub.store.repos and {request.method for request in hub.requests} <= {"GET", "HEAD"}
