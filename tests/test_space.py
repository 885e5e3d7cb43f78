"""The page as a Space: its files, who may publish it, and that they answer without this package."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest
import yaml
from conftest import Say
from demo_pages import free_port
from fork_server import wait_for
from gradio_client import Client, handle_file
from loopback_hub import LoopbackHub
from test_demo_images import scene

from vit_finetune.evaluation.prediction import predict
from vit_finetune.publishing.space import Published, build_space
from vit_finetune.recipe import load_recipe
from vit_finetune.run import Run

MODEL = Published("ann/colours", "0" * 40, "mit")


def texts(model: Published = MODEL, space: str = "ann/colours-page") -> dict[str, str]:
    files = build_space(space, model)
    return {name: content.decode() for name, content in files.items() if isinstance(content, bytes)}


def test_the_files_stand_alone() -> None:
    files = texts()
    assert sorted(files) == [
        "README.md",
        "app.py",
        "attention.py",
        "gate.py",
        "images.py",
        "requirements.txt",
    ]
    required = {line.partition("==")[0] for line in files["requirements.txt"].split()}
    known = {"PIL": "pillow", "starlette": "gradio"} | {name.replace("-", "_"): name for name in required}
    for name in ("app.py", "attention.py", "gate.py", "images.py"):
        assert "vit_finetune" not in files[name]
        for node in ast.walk(ast.parse(files[name])):
            modules = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import)
                else [str(node.module)] if isinstance(node, ast.ImportFrom)
                else []
            )  # fmt: skip
            for module in (module.partition(".")[0] for module in modules):
                assert (
                    module in sys.stdlib_module_names
                    or f"{module}.py" in files
                    or known.get(module) in required
                ), f"{name} imports {module}"


def test_the_versions_are_those_installed_here() -> None:
    lines = dict(line.split("==") for line in texts()["requirements.txt"].split())
    assert {name: version(name).partition("+")[0] for name in lines} == lines
    assert all(re.fullmatch(r"[\d.]+", number) for number in lines.values())


def test_the_head_is_what_the_hub_reads() -> None:
    head = yaml.safe_load(texts()["README.md"].split("---\n")[1])
    assert head["sdk"] == "gradio" and head["sdk_version"] == version("gradio")
    assert head["app_file"] == "app.py" and head["models"] == ["ann/colours"] and head["license"] == "mit"
    assert head["python_version"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert "vit-finetune" in head["tags"]
    assert "license" not in yaml.safe_load(texts(Published("a/b", "1", None))["README.md"].split("---\n")[1])


def test_the_page_runs_the_commit_that_was_there() -> None:
    assert f"MODEL, COMMIT = 'ann/colours', '{'0' * 40}'" in texts()["app.py"]


# --------------------------------------------------------------------------- on the Hub


@pytest.mark.hub
@pytest.mark.slow
def test_a_pushed_model_gets_a_page_that_answers(
    hub: LoopbackHub, say: Say, trained: Run, tmp_path: Path
) -> None:
    code, _, said = say("push", trained.path, "--repo", "ann/colours", "--license", "mit")
    assert code == 0, said
    # The name of the model is free for a Space, as on the Hub.
    code, _, said = say("demo", "ann/colours", "--space", "ann/colours")
    assert code == 0, said
    assert "hub: ann/colours (a new Space), as ann" in said
    assert f"published: {hub.url}/spaces/ann/colours (6 of 6 files were new)" in said
    assert "private" not in said
    repo = hub.repo("ann/colours", "space")
    files = repo.files()
    assert sorted(files) == sorted([".gitattributes", *texts()]) or sorted(files) == sorted(texts())
    head = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert head["models"] == ["ann/colours"] and head["license"] == "mit"
    assert hub.repo("ann/colours").find("main").id in files["app.py"].decode()
    commits = len(repo.commits("main"))
    code, _, said = say("demo", "ann/colours", "--space", "ann/colours")
    assert code == 0 and "(0 of 6 files were new)" in said
    assert len(repo.commits("main")) == commits

    folder = tmp_path / "space"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    scene().save(tmp_path / "scene.png")
    (expected,) = predict(trained.path, [tmp_path / "scene.png"], top=3)
    alone = (
        "import runpy, sys; sys.modules['vit_finetune'] = None; runpy.run_path('app.py', run_name='__main__')"
    )
    port = free_port()
    environment = hub.environment(None, tmp_path / "home") | {
        "GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1", "OMP_NUM_THREADS": "1",
        "GRADIO_TEMP_DIR": str(tmp_path / "uploads"),
    }  # fmt: skip
    with (tmp_path / "said").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", alone], cwd=folder, env=environment, stdout=log, stderr=log
        )
        try:
            told = wait_for(lambda: _ask(port, tmp_path / "scene.png", process, log.name), pause=0.5)
        finally:
            process.kill()
            process.wait()
    assert {one["label"]: one["confidence"] for one in told[0]["confidences"]} == {
        one["label"]: pytest.approx(one["probability"], abs=1e-6) for one in expected["predictions"]
    }
    assert len(told) == 2  # the answer and where it looked: no images of the data


def _ask(port: int, image: Path, process: subprocess.Popen[bytes], log: str) -> tuple[object, ...] | None:
    """What the Space says of an image; None while it is starting."""
    assert process.poll() is None, Path(log).read_text()
    try:
        client = Client(
            f"http://127.0.0.1:{port}/", verbose=False, analytics_enabled=False, download_files=False
        )
    except (OSError, ValueError, httpx.HTTPError):
        return None
    with closing(client):
        return client.predict(handle_file(str(image)), api_name="/predict")  # type: ignore[no-any-return]


@pytest.mark.hub
@pytest.mark.slow
def test_a_run_is_shown_as_it_was_pushed_or_not_at_all(
    hub: LoopbackHub, say: Say, run: Run, tmp_path: Path
) -> None:
    code, _, said = say("demo", run.path, "--space", "ann/page")
    assert code == 1 and "its recipe does not say where the model is on the Hub" in said
    recipe = load_recipe(run.recipe, ["hub.model_id=ann/colours"])
    run.recipe.write_text(recipe.to_yaml(resolved=True))
    code, _, said = say("demo", run.path, "--space", "ann/page")
    assert code == 1 and "ann/colours: there is no such model on the Hub" in said
    code, _, said = say("push", run.path, "--private")
    assert code == 0, said
    code, _, said = say("demo", run.path, "--space", "ann/page")
    assert code == 0, said
    assert "warning: ann/colours is private: give the Space, in its settings, a secret HF_TOKEN" in said
    assert "ann/page may be public: then everybody can ask the model" in said
    code, _, said = say("demo", run.path, "--space", "ann/hidden", "--private")
    assert code == 0 and hub.repo("ann/hidden", "space").private
    assert "secret HF_TOKEN" in said and "may be public" not in said
    config = run.model / "config.json"
    config.write_text(config.read_text() + "\n")
    code, _, said = say("demo", run.path, "--space", "ann/page")
    assert code == 1 and f"ann/colours holds another model than {run.path}: config.json differs" in said


@pytest.mark.hub
@pytest.mark.slow
def test_what_cannot_be_a_page_of_a_space_is_refused(hub: LoopbackHub, say: Say, trained: Run) -> None:
    hub.token("ann")
    hub.create("ann/adapter", files={"adapter_config.json": b"{}", "config.json": b"{}"})
    hub.create("ann/words", files={"notes.txt": b"x"})
    for name in ("ann/adapter", "ann/words"):
        code, _, said = say("demo", name, "--space", "ann/page")
        assert code == 1 and f"{name} is no model that a Space can load by itself" in said
    code, _, said = say("demo", trained.model, "--space", "ann/page")
    assert code == 1 and "a Space loads its model from the Hub" in said
    hub.create("ann/model", files={"config.json": b"{}", "model.safetensors": b"x"})
    hub.create("ann/taken", "space", files={"app.py": b"print()"})
    code, _, said = say("demo", "ann/model", "--space", "ann/taken")
    assert code == 1 and "ann/taken holds something else already" in said
    code, _, said = say("demo", "ann/model", "--space", "page")
    assert code == 1 and "write ann/page" in said
    code, _, said = say("demo", "ann/model", "--space", "bob/page", user="ann")
    assert code == 1 and "may not make repositories for bob" in said
    code, _, said = say("demo", "ann/model", "--space", "ann/page", user=None)
    assert code == 1 and "hf auth login" in said
    assert ("space", "ann/page") not in hub.store.repos
