"""Images to the Hub, a model trained on them, published, proven and used by its id: commands as people say them."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from loopback_hub import LoopbackHub
from PIL import Image
from sklearn.datasets import load_digits

from vit_finetune.run import Report, Run

pytestmark = [pytest.mark.hub, pytest.mark.slow]

TOKEN = "VIT_FINETUNE_TEST_HUB_TOKEN"
"""Variable with a token that may write, for the one test that goes to the real Hub."""

WHO = "from huggingface_hub import HfApi; print(HfApi().whoami()['name'])"
FORGET = """
from huggingface_hub import HfApi
HfApi().delete_repo({repo!r}, repo_type={kind!r}, missing_ok=True)
"""
PIPELINE = """
import json
from transformers import pipeline
print(json.dumps(pipeline("image-classification", model={repo!r}, top_k=10)({photo!r})))
"""


@dataclass(frozen=True)
class Account:
    """Somebody with an account, and what their commands need to use it."""

    user: str
    environment: dict[str, str]

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        """What Python answers with their token."""
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done

    def say(self, *words: object) -> tuple[str, str]:
        """What `vit-finetune` prints on stdout and stderr."""
        done = self.run("-m", "vit_finetune", *words)
        return done.stdout, done.stderr


@pytest.fixture
def out_there(tmp_path: Path) -> Iterator[tuple[Account, str]]:
    """An account of the real Hub, and a name for repositories that are there for the length of a test."""
    token = os.environ.get(TOKEN)
    if not token:
        pytest.skip(f"{TOKEN} is not set: nothing is published on the real Hub")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING_FACE_"))}
    environment = kept | {"HF_TOKEN": token, "HF_HOME": str(tmp_path / "home")}
    account, name = Account("", environment), f"vit-finetune-test-{secrets.token_hex(4)}"
    account = replace(account, user=account.run("-c", WHO).stdout.strip())
    yield account, name
    for repo, kind in ((name, "model"), (f"{name}-images", "dataset")):
        account.run("-c", FORGET.format(repo=f"{account.user}/{repo}", kind=kind))


def draw_digits(folder: Path, count: int) -> Path:
    """So many of scikit-learn's digits as a folder of images."""
    digits = load_digits()
    for index, (pixels, label) in enumerate(zip(digits.images[:count], digits.target, strict=False)):
        path = folder / str(label) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype(np.uint8)).save(path)
    return folder


def go_round(account: Account, name: str, folder: Path, count: int = 1797) -> None:
    """Up with so many images, train on them by their id, publish, and use the model by its id."""
    images, repo, tested = draw_digits(folder / "images", count), f"{account.user}/{name}", count // 5
    _, told = account.say("upload-data", images, f"{repo}-images", "--private")
    assert "verified: " in told
    run = Run(folder / "run")
    where = (f"data.path={repo}-images", f"training.output_dir={run.path}")
    hub = ("hub.push=true", f"hub.model_id={repo}", "hub.private=true", "hub.license=apache-2.0")
    _, told = account.say("train", "digits", *where, *hub, "training.num_train_epochs=3")
    assert f"`pipeline` scores {min(64, tested)} of {tested} test images as reported" in told
    assert Report.load(run.report("test")).num_images == tested
    facts = run.read_provenance()["data"]
    assert facts["source"] == "hub" and len(facts["revision"]) == 40

    _, told = account.say("push", run.path, "--tag", "v1", "--verify", "full")
    assert "it held these files already" in told
    assert f"`pipeline` scores {tested} of {tested} test images as reported" in told
    scored, _ = account.say("evaluate", f"{repo}@v1", "--data", images, "--json")
    assert json.loads(scored)["num_images"] == count
    photo = images / "3" / "3.png"
    answered, _ = account.say("predict", f"{repo}@v1", photo, "--top", 10, "--json")
    ours = {row["label"]: row["probability"] for row in json.loads(answered)[0]["predictions"]}
    done = account.run("-c", PIPELINE.format(repo=repo, photo=str(photo)))
    theirs = {row["label"]: row["score"] for row in json.loads(done.stdout)}
    assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize(("xet", "count"), [(False, 1797), (True, 300)], ids=["plain", "xet"])
def test_there_and_back(hub: LoopbackHub, tmp_path: Path, xet: bool, count: int) -> None:
    ann = Account("ann", hub.environment(hub.token("ann"), tmp_path / "home", xet=xet))
    go_round(ann, "digits", tmp_path, count)
    by_xet = [request for request in hub.requests if "/xet-write-token/" in request.path]
    assert bool(by_xet) == xet
    titles = [commit.title for commit in hub.repo("ann/digits").commits()]
    assert titles == ["Upload run with vit-finetune", "initial commit"]


def test_there_and_back_on_the_real_hub(out_there: tuple[Account, str], tmp_path: Path) -> None:
    account, name = out_there
    go_round(account, name, tmp_path)
