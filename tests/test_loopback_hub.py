"""The loopback Hub does what the real clients expect of a Hub, and what tests ask it to do to them."""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loopback_hub import LoopbackHub, loopback_hub

pytestmark = pytest.mark.hub

CLIENT = """
import json, os, sys
from pathlib import Path
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download

api = HfApi()
told = {}

def error(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as found:
        return [type(found).__name__, getattr(getattr(found, "response", None), "status_code", None)]

def read(folder):
    return {path.name: path.read_bytes().hex() for path in Path(folder).rglob("*") if path.is_file()}
"""


def client(
    hub: LoopbackHub, token: str | None, home: Path, source: str, *words: object, xet: bool = False
) -> Any:
    """Runs a script in a process of its own and answers what it told."""
    script = CLIENT + source + "\nprint(json.dumps(told))"
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)],
        env=hub.environment(token, home, xet),
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def ask(
    hub: LoopbackHub, method: str, path: str, body: bytes = b"", **headers: str
) -> http.client.HTTPResponse:
    """Asks without a client between."""
    connection = http.client.HTTPConnection("127.0.0.1", hub.port, timeout=10)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    answer.content = answer.read()  # type: ignore[attr-defined]
    connection.close()
    return answer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with what takes each way to the Hub: small, large by name, in parts, empty."""
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    card = (
        "license: mit\nlibrary_name: transformers\npipeline_tag: image-classification\nbase_model: google/vit"
    )
    (folder / "README.md").write_text(f"---\n{card}\ndatasets: [ada/digits]\n---\nA model.")
    weights = np.random.default_rng(0).normal(size=30_000).astype(np.float32)
    (folder / "model.safetensors").write_bytes(weights.tobytes())
    (folder / "parts.bin").write_bytes(b"part" * 300_000)
    (folder / "sub" / "notes.txt").write_text("notes")
    (folder / "empty.bin").touch()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_published_comes_back_and_is_not_sent_twice(
    hub: LoopbackHub, model: Path, tmp_path: Path
) -> None:
    hub.multipart_bytes, hub.part_bytes = 1_000_000, 500_000
    hub.page = 2
    token = hub.token("ada")
    told = client(
        hub,
        token,
        tmp_path / "home",
        """
api.create_repo("ada/vit", private=True)
first = api.upload_folder(repo_id="ada/vit", folder_path=sys.argv[1], commit_message="Push")
again = api.upload_folder(repo_id="ada/vit", folder_path=sys.argv[1], commit_message="Push")
told["commits"] = [first.oid, again.oid]
api.create_tag("ada/vit", tag="v1")
api.create_branch("ada/vit", branch="dev/x")
api.upload_file(repo_id="ada/vit", path_or_fileobj=b"x", path_in_repo="x.txt", revision="dev/x")
pull = api.upload_file(repo_id="ada/vit", path_or_fileobj=b"y", path_in_repo="y.txt", create_pr=True)
told["pull"] = [pull.pr_revision, [(one.num, one.title, one.author, one.status, one.is_pull_request)
                for one in api.get_repo_discussions("ada/vit")]]
told["snapshot"] = read(snapshot_download("ada/vit", revision="v1"))
told["others"] = [Path(hf_hub_download("ada/vit", name, revision=revision)).read_text()
                  for name, revision in [("x.txt", "dev/x"), ("y.txt", "refs/pr/1")]]
told["tree"] = [entry.path for entry in api.list_repo_tree("ada/vit", recursive=True, expand=True)]
info = api.model_info("ada/vit", files_metadata=True)
told["info"] = [info.sha, info.private, info.pipeline_tag, info.library_name, info.card_data.license, info.tags]
told["history"] = [commit.title for commit in api.list_repo_commits("ada/vit")]
told["listed"] = [one.id for one in api.list_models(author="ada")]
""",
        model,
    )
    repo = hub.repo("ada/vit")
    sent = contents(model)
    held = repo.files()
    assert ".gitattributes" in held
    assert held == sent | {".gitattributes": held[".gitattributes"]}
    assert repo.lfs_paths() == {"model.safetensors", "parts.bin"}
    assert [commit.title for commit in repo.commits()] == ["Push", "initial commit"] == told["history"]
    assert told["commits"] == [repo.commits()[0].id] * 2
    assert {name: bytes.fromhex(content) for name, content in told["snapshot"].items()} == {
        Path(name).name: content for name, content in held.items()
    }
    assert told["others"] == ["x", "y"]
    title = "Upload y.txt with huggingface_hub"
    assert told["pull"] == ["refs/pr/1", [[1, title, "ada", "open", True]]]
    assert told["tree"] == sorted([*held, "sub"])
    assert told["info"][:5] == [repo.commits()[0].id, True, "image-classification", "transformers", "mit"]
    assert {"license:mit", "base_model:finetune:google/vit", "dataset:ada/digits"} < set(told["info"][5])
    assert told["listed"] == ["ada/vit"]
    assert set(repo.refs()) == {"refs/heads/main", "refs/heads/dev/x", "refs/tags/v1", "refs/pr/1"}
    puts = [request for request in hub.requests if request.method == "PUT"]
    assert sum(request.body_bytes for request in puts) == sum(len(sent[name]) for name in repo.lfs_paths())
    assert len(puts) == 1 + 3  # in parts
    assert token not in repr(hub.requests)


RIGHTS = {
    "no such token, whoami": ("HfHubHTTPError", 401),
    "no such token": ("HfHubHTTPError", 401),
    "create below another user": ("HfHubHTTPError", 403),
    "create below an organization, reading member": ("HfHubHTTPError", 403),
    "create with a read token": ("HfHubHTTPError", 403),
    "create what is there": ("HfHubHTTPError", 409),
    "write with a read token": ("HfHubHTTPError", 403),
    "write to another's": ("HfHubHTTPError", 403),
    "may I write to another's": ("HfHubHTTPError", 403),
    "write to another's private one": ("RepositoryNotFoundError", 404),
    "write without a token": ("RepositoryNotFoundError", 401),
    "read a private one": ("RepositoryNotFoundError", 404),
    "read a private one without a token": ("RepositoryNotFoundError", 401),
    "read a gated one": ("GatedRepoError", 403),
    "read a gated one without a token": ("GatedRepoError", 401),
    "information on a gated one": None,
    "read a gated one, let in": None,
    "write as a member": None,
    "propose to another's": None,
    "no such repository": ("RepositoryNotFoundError", 404),
    "no such revision": ("RevisionNotFoundError", 404),
    "no such file": ("RemoteEntryNotFoundError", 404),
    "delete no such file": ("RemoteEntryNotFoundError", 404),
    "tag twice": ("HfHubHTTPError", 409),
    "commit on what is not the head": ("HfHubHTTPError", 412),
    "a card that is no YAML": ("ValueError", None),
}


def test_errors_are_told_as_the_hub_tells_them(hub: LoopbackHub, tmp_path: Path) -> None:
    tokens = {
        "reader": hub.token("ada", "read"),
        "bob": hub.token("bob"),
        "eve": hub.token("eve"),
        "missing": "hf_missing",
    }
    hub.add_org("team", {"ada": "write", "bob": "read"})
    for name in ("ada/open", "bob/open", "team/open"):
        hub.create(name, files={"a.txt": b"a"})
    hub.create("bob/secret", private=True, files={"a.txt": b"a"})
    hub.create("bob/gated", gated=True, files={"a.txt": b"a"}).granted.add("eve")
    told = client(
        hub,
        hub.token("ada"),
        tmp_path,
        """
tokens = json.loads(sys.argv[1]) | {"nobody": False}
def create(name, who=None): return error(api.create_repo, name, token=tokens.get(who))
def read(name, who=None, file="a.txt", **how): return error(hf_hub_download, name, file, token=tokens.get(who), **how)
def write(name, who=None, file="b.txt", content=b"b", **how):
    return error(api.upload_file, repo_id=name, path_or_fileobj=content, path_in_repo=file, token=tokens.get(who), **how)
def commit(name, *what, **how): return error(api.create_commit, name, what, commit_message="m", **how)

told["no such token, whoami"] = error(api.whoami, token=tokens["missing"])
told["no such token"] = read("ada/open", "missing")
told["create below another user"] = create("bob/new")
told["create below an organization, reading member"] = create("team/new", "bob")
told["create with a read token"] = create("ada/new", "reader")
told["create what is there"] = create("ada/open")
told["write with a read token"] = write("ada/open", "reader")
told["write to another's"] = write("bob/open")
told["may I write to another's"] = error(api.auth_check, "bob/open", write=True)
told["write to another's private one"] = write("bob/secret")
told["write without a token"] = write("ada/open", "nobody")
told["read a private one"] = read("bob/secret")
told["read a private one without a token"] = read("bob/secret", "nobody")
told["read a gated one"] = read("bob/gated")
told["read a gated one without a token"] = read("bob/gated", "nobody")
told["information on a gated one"] = error(api.model_info, "bob/gated")
told["read a gated one, let in"] = read("bob/gated", "eve")
told["write as a member"] = write("team/open")
told["propose to another's"] = write("bob/open", create_pr=True)
told["no such repository"] = read("bob/none")
told["no such revision"] = read("ada/open", revision="none")
told["no such file"] = read("ada/open", file="none")
told["delete no such file"] = commit("ada/open", CommitOperationDelete("none"))
told["tag twice"] = error(api.create_tag, "ada/open", tag="t") or error(api.create_tag, "ada/open", tag="t")
told["commit on what is not the head"] = commit("ada/open", CommitOperationAdd("c", b"c"), parent_commit="0" * 40)
told["a card that is no YAML"] = write("ada/open", file="README.md", content=b"---\\na: [\\n---\\n")
""",
        json.dumps(tokens),
    )
    assert {what: found and tuple(found) for what, found in told.items()} == RIGHTS
    assert [len(hub.repo(name).commits()) for name in ("ada/open", "bob/open", "team/open")] == [2, 2, 3]
    with pytest.raises(KeyError):
        hub.repo("bob/new")


def test_passing_faults_pass(hub: LoopbackHub, model: Path, tmp_path: Path) -> None:
    hub.fault("POST", "/preupload/", status=500)
    hub.fault("POST", "/objects/batch", status=429, headers={"Retry-After": "1"})
    hub.fault("PUT", "/lfs/", drop_request_after=10_000)
    hub.fault("GET", "/content/", drop_response_after=700_000)
    told = client(
        hub,
        hub.token("ada"),
        tmp_path / "home",
        """
api.create_repo("ada/vit")
api.upload_folder(repo_id="ada/vit", folder_path=sys.argv[1])
told["large"] = Path(hf_hub_download("ada/vit", "parts.bin")).read_bytes().hex()
""",
        model,
    )
    assert bytes.fromhex(told["large"]) == (model / "parts.bin").read_bytes()
    assert len(hub.repo("ada/vit").commits()) == 2

    def seen(word: str) -> list[int]:
        return [request.status for request in hub.requests if word in request.path]

    assert seen("/preupload/") == [500, 200]
    assert seen("/objects/batch") == [429, 200]
    assert sorted(request.status for request in hub.requests if request.method == "PUT") == [0, 200, 200]
    assert seen("/content/") == [200, 200]  # the client keeps what fills its buffer of 10 MB
    assert 10_000 in [request.body_bytes for request in hub.requests if request.status == 0]


@pytest.mark.parametrize("die", ["before", "after"])
def test_a_killed_hub_forgets_nothing_that_it_did(
    hub: LoopbackHub, model: Path, tmp_path: Path, die: Any
) -> None:
    token, push = (
        hub.token("ada"),
        'told = error(api.upload_folder, repo_id="ada/vit", folder_path=sys.argv[1])',
    )
    repo = hub.create("ada/vit")
    hub.fault(".*", "/commit/", die=die)
    assert client(hub, token, tmp_path / "home", push, model)
    assert hub.requests[-1].status == (200 if die == "after" else 0)
    assert len(repo.commits()) == (2 if die == "after" else 1)
    with pytest.raises(ConnectionRefusedError):
        ask(hub, "GET", "/api/whoami-v2")
    hub.start()
    assert client(hub, token, tmp_path / "home", push, model) is None
    assert len(repo.commits()) == 2
    assert contents(model).items() <= repo.files().items()


def test_a_fault_can_come_at_any_request(hub: LoopbackHub) -> None:
    hub.fault(".*", ".*", status=503, skip=2, times=2)
    paths = ["/api/agent-harnesses", *["/api/models"] * 5]
    assert [ask(hub, "GET", path).status for path in paths] == [404, 200, 200, 503, 503, 200]
    assert len(hub.requests) == 5


def test_nothing_is_kept_of_an_upload_that_ends_early_or_is_another(hub: LoopbackHub) -> None:
    content = bytes(range(100))
    path = f"/lfs/{hashlib.sha256(content).hexdigest()}"
    assert ask(hub, "PUT", path, content[:-1] + b"x").status == 400
    connection = http.client.HTTPConnection("127.0.0.1", hub.port, timeout=10)
    connection.request("PUT", path, content[:50], {"Content-Length": "100"})
    connection.close()
    assert ask(hub, "GET", "/api/models").status == 200
    hub.kill()
    hub.start()
    held = [entry for entry in hub.store.objects.folder.rglob("*") if entry.is_file()]
    assert held == []
    assert ask(hub, "PUT", path, content).status == 200
    sha256 = path.removeprefix("/lfs/")
    part = ask(hub, "GET", f"/content/{sha256}?size=100", Range="bytes=10-19")
    assert (part.status, part.content) == (206, content[10:20])  # type: ignore[attr-defined]
    assert part.headers["Content-Range"] == "bytes 10-19/100"


def test_what_has_moved_is_found_under_its_old_name(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.create("ann/old", "dataset", files={"a b.txt": b"words"})
    source = """
api.move_repo("ann/old", "ann/new", repo_type="dataset")
told["id"] = api.repo_info("ann/old", repo_type="dataset", files_metadata=True).id
told["file"] = Path(hf_hub_download("ann/old", "a b.txt", repo_type="dataset")).read_text()
done = api.upload_file(path_or_fileobj=b"more", path_in_repo="b", repo_id="ann/old", repo_type="dataset")
"""
    told = client(hub, hub.token("ann"), tmp_path, source)
    assert (told["id"], told["file"]) == ("ann/new", "words")
    assert hub.repo("ann/new", "dataset").files()["b"] == b"more" and len(hub.store.repos) == 1


def test_a_test_fails_where_the_hub_is_asked_what_it_does_not_know() -> None:
    with pytest.raises(AssertionError, match="GET /api/poetry"), loopback_hub() as hub:
        assert ask(hub, "GET", "/api/poetry").status == 404


def test_datasets_and_transformers_load_by_id(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.create("ada/vit", files={"config.json": b'{"model_type": "vit", "hidden_size": 16}'})
    hub.create("bob/gated", kind="dataset", gated=True, files={"data/train.csv": b"a\n1\n"})
    told = client(
        hub,
        hub.token("ada"),
        tmp_path,
        """
import pyarrow as pa, pyarrow.parquet as pq
from datasets import load_dataset
from transformers import AutoConfig

api.create_repo("ada/digits", repo_type="dataset", private=True)
def upload(labels):
    pq.write_table(pa.table({"label": labels}), "train.parquet")
    return api.upload_file(repo_id="ada/digits", repo_type="dataset", path_or_fileobj="train.parquet",
                           path_in_repo="data/train-00000-of-00001.parquet").oid
old = upload([1, 2])
upload([3])
told["now"] = load_dataset("ada/digits", split="train")["label"][:]
told["then"] = load_dataset("ada/digits", split="train", revision=old)["label"][:]
told["streamed"] = [row["label"] for row in load_dataset("ada/digits", split="train", streaming=True)]
told["gated"] = error(load_dataset, "bob/gated")
told["size"] = AutoConfig.from_pretrained("ada/vit").hidden_size
""",
    )
    gated = ["DatasetNotFoundError", None]
    assert told == {"now": [3], "then": [1, 2], "streamed": [3], "gated": gated, "size": 16}


@pytest.mark.skipif(not importlib.util.find_spec("hf_xet"), reason="there is no hf_xet")
def test_large_files_may_go_through_xet(hub: LoopbackHub, model: Path, tmp_path: Path) -> None:
    token = hub.token("ada")
    upload = (
        'api.create_repo("ada/vit"); told = api.upload_folder(repo_id="ada/vit", folder_path=sys.argv[1]).oid'
    )
    client(hub, token, tmp_path / "up", upload, model, xet=True)
    repo = hub.repo("ada/vit")
    assert contents(model).items() <= repo.files().items()
    assert repo.lfs_paths() == {"model.safetensors", "parts.bin"}
    download = 'told = read(snapshot_download("ada/vit"))'
    through, around = (client(hub, token, tmp_path / str(xet), download, xet=xet) for xet in (True, False))
    assert through == around
    assert bytes.fromhex(through["parts.bin"]) == (model / "parts.bin").read_bytes()
    paths = [request.path for request in hub.requests]
    assert any("/xet-write-token/" in path for path in paths) and any(
        "/xet-read-token/" in path for path in paths
    )
    assert not any(path.startswith("/lfs/") for path in paths)
    assert sum(path.startswith("/content/") for path in paths) == 2  # with Xet off
