"""A model to the Hub: what is published is what was scored, whatever happens on the way."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from conftest import Say, draw_folder, tiny_recipe
from fork_server import IMPATIENT, QUICK
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub

from vit_finetune.recipe import load_recipe
from vit_finetune.run import Report, Run

pytestmark = [pytest.mark.hub, pytest.mark.slow]


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
    code, _, said = say("train", file, "hub.license=my-own")
    assert code == 1 and "does not take what the card says" in said and not (tmp_path / "trained").exists()
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
    expected = hub.repo("ann/colours").files()
    # What only reads leaves nothing behind: killed after such a request, the server is as if killed before it.
    asked = [request.method not in ("GET", "HEAD") for request in hub.requests]
    assert len(asked) > 20 and sum(asked) > 5
    points = [("before", number) for number in range(len(asked))]
    points += [("after", number) for number, changes in enumerate(asked) if changes]
    for die, number in points:
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_says_how_to_go_on_and_leaves_nothing_behind(
    hub: LoopbackHub, say: Say, run: Run, tmp_path: Path, number: signal.Signals
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    stopping = f"""
import os, tempfile
from vit_finetune import pushing
tempfile.tempdir = {str(temporary)!r}
pushing.download_model = lambda *words: [*os.scandir({str(temporary)!r})] and os.kill(os.getpid(), {number:d})
"""
    code, _, said = say("push", run.path, "--repo", "ann/colours", before=stopping)
    assert code == (130 if number == signal.SIGINT else 75) and "saying the same again completes it" in said
    assert not any(temporary.iterdir())
    recipe = load_recipe(run.recipe).to_yaml(resolved=False)
    (tmp_path / "again.yaml").write_text(recipe)
    words = ("hub.push=true", "hub.model_id=ann/colours", f"training.output_dir={run.path}")
    code, _, said = say("train", tmp_path / "again.yaml", *words, "--resume", before=stopping)
    assert (
        code == (130 if number == signal.SIGINT else 75)
        and f"push it with: vit-finetune push {run.path}" in said
    )


def test_faults_that_pass_are_outlasted_before_anything_is_sent(hub: LoopbackHub, say: Say, run: Run) -> None:
    words = ("push", run.path, "--repo", "ann/colours", "--tag", "v1", "--verify", "files")
    for count, routes in enumerate([
        ("whoami", "models/ann/colours$", "datasets/", "spaces/", "validate-yaml"),
        ("whoami", "models/ann/colours$", "auth-check/write", "refs", "validate-yaml"),
    ]):  # fmt: skip
        for route in routes:
            hub.fault(".*", route, status=503)
        code, _, said = say(*words, before=IMPATIENT)
        assert code == 0 and ("held these files" in said) == bool(count), said
        assert not any(fault.times for fault in hub.faults)


def test_a_tag_stays_where_the_same_files_are(hub: LoopbackHub, say: Say, run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "other" / "run")
    other = Run(tmp_path / "other" / "run")
    with (other.model / "README.md").open("a") as card:
        card.write("Another.\n")
    words = ("--repo", "ann/colours", "--verify", "files")
    assert say("push", run.path, *words, "--tag", "v1")[0] == 0
    repo = hub.repo("ann/colours")
    first = repo.commits()[0].id
    assert say("push", other.path, *words)[0] == 0
    code, _, said = say("push", run.path, *words, "--tag", "v1")
    assert code == 0 and repo.tags["v1"].id == first != repo.commits()[0].id, said
    code, _, said = say("push", other.path, *words, "--tag", "v1")
    assert code == 1 and "the tag v1 names another commit already" in said and len(repo.commits()) == 4
    assert say("push", run.path, *words, "--revision", "dev")[0] == 0
    code, _, said = say("push", run.path, *words, "--tag", "dev")
    assert code == 1 and "dev is a branch there" in said and "dev" not in repo.tags
    faster = """
from vit_finetune import pushing
pushing.check_tag_free = lambda *words: None
"""
    code, _, said = say("push", other.path, *words, "--tag", "v1", before=faster)
    assert code == 1 and "is published, but ann/colours: the tag v1 names another commit" in said


def test_what_an_earlier_model_left_is_deleted_and_nothing_else(hub: LoopbackHub, say: Say, run: Run) -> None:
    stale = {
        "model-00001-of-00002.safetensors": b"old",
        "model.safetensors.index.json": b"{}",
        "pytorch_model.bin": b"old",
        "tf_model.h5": b"old",
        ".eval_results/ann--photos.yaml": b"[]",
    }
    theirs = {
        "LICENSE": b"mine",
        "onnx/model.onnx": b"x",
        "lora/adapter_model.safetensors": b"x",
        "x.h5": b"x",
    }
    card = b"---\ntags: [vit-finetune]\n---\n"
    hub.create("ann/colours", files={"README.md": card, **stale, **theirs})
    code, _, said = say("push", run.path, "--repo", "ann/colours")
    assert code == 0 and "deleted: " in said and "verified" in said, said
    files = hub.repo("ann/colours").files()
    assert not files.keys() & stale.keys() and theirs.items() <= files.items()


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
    for told, expected in (
        (
            {"HF_HUB_OFFLINE": "1"},
            "HF_HUB_OFFLINE keeps this command from the network, so nothing can be publ",
        ),
        ({"HF_ENDPOINT": "127.0.0.1:1"}, "expected an address, such as https://127.0.0.1:1"),
        ({"HF_ENDPOINT": "http://ann:secret@127.0.0.1:1"}, "the Hub (http://127.0.0.1:1) cannot be reached"),
        ({"HF_TOKEN": "hf_sécret"}, "characters that no token has"),
    ):
        code, _, said = say("push", run.path, "--repo", "ann/colours", before=IMPATIENT, **told)
        assert code == 1 and expected in said and said.count("error:") == 1 and "cret" not in said, said
    code, _, said = say("push", run.path, "--repo", "ann/colours", "--license", "my-own")
    assert code == 1 and "the Hub does not take what the card says: " in said and "must be one of" in said
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


def test_a_model_that_strangers_cannot_use_is_said_to_be_none(hub: LoopbackHub, say: Say, run: Run) -> None:
    config = json.loads((run.model / "config.json").read_text())
    azure = {"id2label": config["id2label"] | {"0": "azure"}, "label2id": {"azure": 0, "green": 1, "red": 2}}
    for changes, expected in (
        (azure, "has other classes than the report: azure, blue"),
        ({"hidden_size": 32}, "cannot be used (ValueError: Could not load model"),
        ({"image_size": 20}, "cannot be used ("),
    ):
        (run.model / "config.json").write_text(json.dumps(config | changes))
        code, _, said = say("push", run.path, "--repo", "ann/colours", "--force")
        assert code == 1 and f"is published, but what was downloaded {expected}" in said, said
        assert len(said.splitlines()) == 3
    (run.model / "config.json").write_text(json.dumps(config))
    (run.model / "preprocessor_config.json").write_text("{}")
    code, _, said = say("push", run.path, "--repo", "ann/colours", "--force")
    assert code == 1 and "cannot be used (ValueError: Input image size (224*224)" in said, said


def test_what_is_published_in_no_case(hub: LoopbackHub, say: Say, run: Run, tmp_path: Path) -> None:
    words = ("push", run.path, "--repo", "ann/colours", "--force", "--verify", "files")
    (tmp_path / "secret").write_text("secret")
    for name in (".DS_Store", ".git/config", ".env", "[a] note*.txt"):
        (run.model / name).parent.mkdir(exist_ok=True)
        (run.model / name).write_text("text")
    for name, make, expected in (
        (
            "link.txt",
            lambda path: path.symlink_to(tmp_path / "secret"),
            "is a link out of the model's folder",
        ),
        ("code.py", lambda path: path.write_text(""), "runs no code of its own"),
        ("old.PKL", lambda path: path.write_text(""), "has no pickles"),
        ("two\nlines", lambda path: path.write_text(""), "its name holds what cannot be shown"),
    ):
        make(run.model / name)
        code, _, said = say(*words)
        assert code == 1 and expected in said and not hub.requests, said
        (run.model / name).unlink()
    code, _, said = say(*words)
    assert code == 0, said
    files = hub.repo("ann/colours").files()
    assert "[a] note*.txt" in files and {name for name in files if name[0] == "."} == {".gitattributes"}
    (run.model / "model.safetensors").unlink()
    code, _, said = say(*words)
    assert code == 1 and "Bring back model/model.safetensors" in said


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
    # Of the same title, by somebody else.
    code, _, said = say("push", run.path, *words, user="eve")
    assert code == 0 and "/discussions/2" in said and len(repo.commits("refs/pr/1")) == 2


def test_a_run_that_was_not_tested_is_refused(say: Say, run: Run) -> None:
    run.report("test").unlink()
    code, _, said = say("push", run.path, "--repo", "ann/colours")
    assert code == 1 and "there is no test report" in said


def test_a_dry_run_shows_and_sends_nothing(hub: LoopbackHub, say: Say, run: Run) -> None:
    code, out, said = say("push", run.path, "--repo", "ann/colours", "--dry-run", user=None)
    assert code == 0 and "model.safetensors" in out and "model-index:" in out and "nothing was sent" in said
    assert " kB  model.safetensors" in out and not hub.store.repos and not hub.requests
