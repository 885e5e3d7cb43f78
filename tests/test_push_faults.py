"""Disks that fill up and connections that break, on the way to and from the Hub; and what is there beside a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import COLOURS, Say, draw_folder, draw_image, tiny_recipe
from fork_server import IMPATIENT
from huggingface_hub import ModelCard, parse_eval_result_entries
from loopback_hub import LoopbackHub

from vit_finetune.run import Report, Run

pytestmark = [pytest.mark.hub, pytest.mark.slow]

CONTENT = "/content/"
"""Where weights are downloaded from."""
LOOK_AGAIN = "\nimport tempfile\ntempfile.tempdir = None\n"
"""Source to run before where TMPDIR is told: the server that forks has looked for the folder already."""


@pytest.fixture
def published(hub: LoopbackHub, trained: Run) -> str:
    """The id of a model that is on the Hub."""
    hub.create("ann/colours", files={path.name: path.read_bytes() for path in trained.model.iterdir()})
    return "ann/colours"


def test_a_disk_that_fills_up_while_a_model_arrives(
    published: str, say: Say, folder: Path, small_disk: Callable[[str], Path]
) -> None:
    home = str(small_disk("size=16k"))
    code, _, said = say("evaluate", published, "--data", folder, HF_HOME=home)
    assert code == 1 and said.count("error:") == 1 and "the disk is full" in said, said
    small_disk("size=64m")
    code, _, said = say("evaluate", published, "--data", folder, HF_HOME=home)
    assert code == 0, said


def test_a_disk_that_fills_up_while_a_push_is_proven(
    hub: LoopbackHub, say: Say, run: Run, small_disk: Callable[[str], Path]
) -> None:
    """What is published by then is said to be, and the proof is made up for by saying it again."""
    temporary = small_disk("size=16k")
    words = ("push", run.path, "--repo", "ann/colours")
    code, _, said = say(*words, before=LOOK_AGAIN, TMPDIR=str(temporary))
    assert code == 1 and said.count("error:") == 1, said
    assert "is published, but to verify it the disk is full" in said
    assert not list(temporary.iterdir())
    small_disk("size=64m")
    code, _, said = say(*words, before=LOOK_AGAIN, TMPDIR=str(temporary))
    assert code == 0 and "it held these files already" in said and "verified: " in said, said
    assert len(hub.repo("ann/colours").commits()) == 2


def test_a_connection_that_breaks_in_mid_download(
    hub: LoopbackHub, published: str, say: Say, folder: Path
) -> None:
    hub.fault("GET", CONTENT, drop_response_after=1000, times=10_000)
    code, _, said = say("evaluate", published, "--data", folder, before=IMPATIENT)
    assert code == 1 and said.count("error:") == 1 and "cannot be reached" in said, said
    hub.faults.clear()
    hub.fault("GET", CONTENT, drop_response_after=1000)
    before = len(hub.requests)
    code, _, said = say("evaluate", published, "--data", folder, before=IMPATIENT)
    assert code == 0, said
    assert len([request for request in hub.requests[before:] if CONTENT in request.path]) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_arrives_as_another_is_noticed(hub: LoopbackHub, say: Say, run: Run, name: str) -> None:
    """The Hub still names the checksum of what was sent, and gives out something else."""
    words = ("push", run.path, "--repo", "ann/colours", "--verify", "files")
    assert say(*words)[0] == 0
    sent = (run.model / name).read_bytes()
    hub.store.objects.path(hashlib.sha256(sent).hexdigest()).write_bytes(sent[:-2] + b"??")
    code, _, said = say(*words)
    assert code == 1 and said.count("error:") == 1, said
    assert "is published, but" in said and f"{name} arrives as another file than was sent" in said


def test_a_connection_that_breaks_in_mid_upload(hub: LoopbackHub, say: Say, run: Run) -> None:
    hub.fault("PUT", "/lfs/", drop_request_after=1000, times=2)
    hub.fault("POST", "/commit/", status=503)
    code, _, said = say("push", run.path, "--repo", "ann/colours", "--verify", "files", before=IMPATIENT)
    assert code == 0 and "trying again" in said, said
    assert len(hub.repo("ann/colours").commits()) == 2


def test_scores_on_a_dataset_of_the_hub_are_where_its_leaderboard_looks(
    hub: LoopbackHub, say: Say, tmp_path: Path
) -> None:
    """The card's tags are the recipe's, and a test split that was carved is nobody's benchmark."""
    own, carved = tmp_path / "own", tmp_path / "carved"
    draw_folder(carved)
    draw_folder(own / "train")
    for name in ("blue", "green", "red"):
        (own / "test" / name).mkdir(parents=True)
        draw_image(COLOURS[name], 77, (25, 25)).save(own / "test" / name / "0.png")
    for images in (own, carved):
        code, _, said = say("upload-data", images, f"ann/{images.name}-photos")
        assert code == 0, said
        where = {"push": True, "model_id": f"ann/{images.name}", "tags": ["birds", "vision"]}
        recipe = tiny_recipe(f"ann/{images.name}-photos", tmp_path / f"run-{images.name}", hub=where)
        (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(resolved=False))
        code, _, said = say("train", tmp_path / "recipe.yaml")
        assert code == 0, said
    files = hub.repo("ann/own").files()
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[".eval_results/ann--own-photos.yaml"]))
    report = Report.load(Run(tmp_path / "run-own").report("test"))
    assert (entry.dataset_id, entry.value) == ("ann/own-photos", report.accuracy)
    assert entry.dataset_revision == hub.repo("ann/own-photos", "dataset").commits()[0].id
    card = ModelCard(files["README.md"].decode())
    assert card.data.datasets == ["ann/own-photos"]
    assert card.data.tags == ["vision", "image-classification", "vit-finetune", "birds"]
    assert card.data.eval_results is not None
    assert {result.dataset_revision for result in card.data.eval_results} == {entry.dataset_revision}
    assert not [name for name in hub.repo("ann/carved").files() if name.startswith(".eval_results")]


def test_what_a_model_needs_is_all_that_is_downloaded(
    hub: LoopbackHub, published: str, say: Say, folder: Path
) -> None:
    files = {"pytorch_model.bin": b"pickled", "modeling_own.py": b"code", "notes/figure.png": b"pixels"}
    store, repo = hub.store, hub.repo(published)
    store.add(repo, "main", "ann", "More", files={k: store.objects.regular(v) for k, v in files.items()})
    code, out, said = say("evaluate", published, "--data", folder, "--json")
    assert code == 0 and json.loads(out)["num_images"] == 36, said
    fetched = {request.path.rpartition("/")[2] for request in hub.requests if "/resolve/" in request.path}
    assert "config.json" in fetched and not fetched & {"pytorch_model.bin", "modeling_own.py", "figure.png"}
