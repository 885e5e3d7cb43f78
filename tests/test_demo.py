"""The demo's page in a real browser, and its server as a stranger would try it."""

from __future__ import annotations

import base64
import json
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_VIT
from demo_pages import ZONE, Served, drop, free_port, served
from fork_server import ForkServer, wait_for
from gradio_client import handle_file
from playwright.sync_api import Browser, Page, expect
from test_demo_images import bomb

from vit_finetune.evaluation.prediction import predict
from vit_finetune.model.loading import load_model
from vit_finetune.recipe import ModelConfig
from vit_finetune.run import Run

pytestmark = pytest.mark.slow

CHINA = Path(str(files("sklearn") / "datasets" / "images" / "china.jpg"))
"""A photograph of 640 × 427 pixels."""


@pytest.fixture(scope="module")
def demo(forks: ForkServer, trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The page of the finished run."""
    with served(forks, tmp_path_factory.mktemp("demo"), trained.path) as page:
        yield page


@pytest.fixture
def page(browser: Browser, demo: Served) -> Iterator[Page]:
    """The page, open; a test fails where it asks anything of another machine, or has errors."""
    page = browser.new_page()
    asked: list[str] = []
    said: list[str] = []
    # An upload may be over before gradio's own script asks how far it is: that is answered with 404.
    page.on(
        "response",
        lambda answer: (
            said.append(answer.url)
            if answer.status >= 400 and answer.status != 413 and "upload_progress" not in answer.url
            else None
        ),
    )
    page.on("request", lambda request: asked.append(request.url))
    page.on(
        "console",
        lambda message: (
            said.append(message.text)
            if message.type == "error"
            and not message.text.startswith(("Failed to load resource", "Response"))
            else None
        ),
    )
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.goto(demo.url)
    page.wait_for_selector(ZONE)
    yield page
    page.close()
    elsewhere = [url for url in asked if not url.startswith((demo.url, "data:", "blob:"))]
    assert len(asked) > 5 and elsewhere == []
    assert said == []


# --------------------------------------------------------------------------- in a browser


@pytest.mark.browser
def test_a_photograph_is_dropped_and_answered(page: Page, trained: Run) -> None:
    drop(page, "china.jpg", base64.b64encode(CHINA.read_bytes()).decode())
    (expected,) = predict(trained.path, [CHINA], top=3)
    bars = page.locator("[data-testid$='-confidence-set']")
    expect(bars).to_have_count(3, timeout=20_000)
    shown = [" ".join(text.split()) for text in bars.all_inner_texts()]
    assert shown == [f"{one['label']} {100 * one['probability']:.0f}%" for one in expected["predictions"]]
    expect(page.locator("[data-testid='label-output-value']")).to_have_text(
        expected["predictions"][0]["label"]
    )
    expect(page.locator("#attention")).to_contain_text("Where the model looked (attention rollout)")
    overlay = page.locator("#attention img")
    assert overlay.evaluate("image => image.decode().then(() => image.naturalWidth)") == 448
    pictures = page.locator("#examples img")
    expect(pictures).to_have_count(3)  # as many as the validation split has of each class
    assert pictures.first.evaluate("image => image.decode().then(() => image.naturalWidth)") > 100
    assert pictures.first.evaluate("image => image.clientWidth") < 250  # small, and not the page's width


@pytest.mark.browser
def test_a_picked_file_is_answered_and_taken_away(page: Page) -> None:
    page.set_input_files("input[type=file]", CHINA)
    bars = page.locator("[data-testid$='-confidence-set']")
    expect(bars).to_have_count(3, timeout=20_000)
    page.get_by_label("Remove Image").click()
    expect(bars).to_have_count(0, timeout=20_000)
    page.wait_for_selector(ZONE)


@pytest.mark.browser
def test_a_name_that_is_markup_is_shown_as_text(page: Page) -> None:
    name = "<img src=x onerror=alert(1)>.png"
    drop(page, name, base64.b64encode(b"no image").decode(), "image/png")
    expect(page.locator(".toast-wrap")).to_contain_text(
        f"{name} cannot be read: not an image", timeout=20_000
    )
    assert page.locator("img[src=x]").count() == 0


@pytest.mark.browser
def test_a_text_file_and_a_bomb_are_refused(page: Page) -> None:
    drop(page, "notes.txt", base64.b64encode(b"no image").decode(), "text/plain")
    expect(page.locator(".toast-wrap")).to_contain_text("Invalid file type", timeout=20_000)
    drop(page, "bomb.png", base64.b64encode(bomb(12_000)).decode(), "image/png")
    expect(page.locator(".toast-wrap")).to_contain_text("12,000 × 12,000 pixels", timeout=20_000)


@pytest.mark.browser
def test_a_large_file_is_refused_and_its_name_is_no_markup(page: Page, demo: Served, tmp_path: Path) -> None:
    large = tmp_path / "<img src=x onerror=alert(1)>.png"
    with large.open("wb") as file:
        file.truncate(100_000_000)
    before = set(demo.uploads)
    page.set_input_files("input[type=file]", large)
    expect(page.locator(".toast-wrap")).to_contain_text(
        "HTTP 413: This page takes images of up to 20 MB", timeout=20_000
    )
    assert set(demo.uploads) == before


@pytest.mark.browser
def test_ctrl_c_ends_it_while_it_is_looked_at(
    browser: Browser, forks: ForkServer, trained: Run, tmp_path: Path
) -> None:
    with served(forks, tmp_path, trained.path) as demo:
        page = browser.new_page()
        page.goto(demo.url)
        page.set_input_files("input[type=file]", CHINA)
        expect(page.locator("[data-testid$='-confidence-set']")).to_have_count(3, timeout=20_000)
        assert demo.uploads
        started = time.monotonic()
        demo.child.signal(signal.SIGINT)
        assert demo.child.wait(20) == 0
        assert time.monotonic() - started < 10
        assert demo.uploads == []
        assert "what was uploaded is deleted" in demo.child.stderr
        page.close()


# --------------------------------------------------------------------------- by its protocol


def answer_of(demo: Served, path: Path) -> Any:
    """What gradio's own client is told of an image."""
    with demo.client() as client:
        return client.predict(handle_file(str(path)), api_name="/predict")


def test_a_client_is_told_what_predict_says(demo: Served, trained: Run) -> None:
    told = answer_of(demo, CHINA)
    (expected,) = predict(trained.path, [CHINA], top=3)
    confidences = {one["label"]: one["confidence"] for one in told[0]["confidences"]}
    assert confidences == {
        one["label"]: pytest.approx(one["probability"], abs=1e-6) for one in expected["predictions"]
    }


def test_several_labels_are_named_where_they_reach_their_thresholds(
    forks: ForkServer, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, processor = load_model(ModelConfig(config=TINY_VIT), ["red", "round", "old"], multi_label=True)
    model.config.thresholds = [0.0, 1.0, 0.25]
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    (expected,) = predict(tmp_path / "model", [CHINA])
    with served(forks, tmp_path, tmp_path / "model") as demo:
        told = answer_of(demo, CHINA)
    assert {one["label"] for one in told[0]["confidences"]} == {
        "red (threshold 0.00)",
        "round (threshold 1.00)",
        "old (threshold 0.25)",
    }
    assert told[1] == ", ".join(expected["labels"]) == "red, old"


def test_the_server_listens_on_this_machine_alone(demo: Served) -> None:
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address, _, port = local.partition(":")
            if int(port, 16) == demo.port and state == "0A":
                listening.append(address)
    assert listening == ["0100007F"]


def fetch(demo: Served, path: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """Status and body of an answer."""
    headers |= {"Content-Type": "application/json"} if data else {}
    request = urllib.request.Request(demo.url.rstrip("/") + path, data, headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=20) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def ask(demo: Served, *said: Any) -> tuple[int, bytes]:
    """What the server says of files, told in its own words and not by gradio's client."""
    return fetch(demo, "/gradio_api/call/predict", json.dumps({"data": list(said)}).encode())


def test_there_is_one_endpoint_and_no_way_to_other_files(demo: Served, trained: Run) -> None:
    told = json.loads(fetch(demo, "/gradio_api/info")[1])
    assert list(told["named_endpoints"]) == ["/predict"] and not told["unnamed_endpoints"]
    assert fetch(demo, "/")[0] == fetch(demo, "/config")[0] == 200
    for path in (
        *("/monitoring", "/gradio_api/runs", "/gradio_api/openapi.json", "/docs", "/openapi.json", "/login"),
        *("/gradio_api/proxy=https://example.com/", "/gradio_api/file=https://example.com/x.png"),
        *("/gradio_api/file=http://127.0.0.1:1/x", "/gradio_api/deep_link", "/pwa_icon", "/manifest.json"),
        *("/gradio_api/vibe-code", "/gradio_api/run/predict", "/gradio_api/api/predict", "/gradio_api/mcp"),
    ):
        assert fetch(demo, path)[0] == 404, path
    for path in (trained.recipe, trained.path / "model" / "config.json", Path("/etc/passwd"), Path("/etc")):
        assert fetch(demo, f"/gradio_api/file={path}")[0] in (403, 404), path
    picture = trained.path / "pictures" / "mistake-00.jpg"
    refused = (400, b"there is no such upload; drop the image again")
    for said in (
        picture,
        trained.recipe,
        "/etc/passwd",
        "https://example.com/x.png",
        "file:///etc/passwd",
        "",
    ):
        meta = {"_type": "gradio.FileData"}
        assert ask(demo, {"path": str(said), "url": str(said), "meta": meta}) == refused, said
        assert ask(demo, [{"x": {"path": str(said), "meta": meta}}]) == refused, said
    assert fetch(demo, "/gradio_api/call/predict", b"{")[0] == 400
    assert fetch(demo, "/gradio_api/call/predict", b"[" * 90_000)[0] == 400


def test_a_name_that_others_lead_here_is_refused(demo: Served) -> None:
    for host, status in {
        "evil.example": 403, f"evil.example:{demo.port}": 403, "127.0.0.1.evil.example": 403, "[::2]": 403,
        "localhost": 200, f"localhost:{demo.port}": 200, f"127.0.0.1:{demo.port}": 200, "[::1]:80": 200,
    }.items():  # fmt: skip
        assert fetch(demo, "/config", Host=host)[0] == status, host


def send_raw(demo: Served, head: str, pieces: Iterator[bytes]) -> str:
    """The first line of the answer to a request that is sent piece by piece, as far as the server takes it."""
    with socket.create_connection(("127.0.0.1", demo.port), timeout=20) as connection:
        try:
            connection.sendall(head.encode())
            for piece in pieces:
                connection.sendall(piece)
        except (ConnectionResetError, BrokenPipeError):
            pass  # it has heard enough
        try:
            return connection.makefile("rb").readline().decode().strip()
        except ConnectionResetError:
            return "closed"


MULTIPART = (
    b'--x\r\nContent-Disposition: form-data; name="files"; filename="large.png"\r\n'
    b"Content-Type: image/png\r\n\r\n"
)


KINDS = {
    "/gradio_api/upload": "multipart/form-data; boundary=x",
    "/gradio_api/queue/join": "application/json",
}


@pytest.mark.parametrize("path", KINDS)
def test_a_length_that_is_told_is_answered_before_the_body(demo: Served, path: str) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {KINDS[path]}\r\nContent-Length: 100000000\r\n\r\n"
    assert send_raw(demo, head, iter([])).startswith("HTTP/1.1 413 ")


@pytest.mark.parametrize("path", KINDS)
@pytest.mark.parametrize("told", [True, False], ids=["told", "chunked"])
def test_100_mb_are_refused_without_their_memory(demo: Served, path: str, told: bool) -> None:
    _, before, files_before = demo.peak(), demo.peak(), set(demo.uploads)
    length = f"Content-Length: {100_000_000 + len(MULTIPART)}" if told else "Transfer-Encoding: chunked"
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {KINDS[path]}\r\n{length}\r\n\r\n"

    def pieces() -> Iterator[bytes]:
        for piece in (MULTIPART, *[b"\0" * 1_000_000] * 100):
            yield piece if told else b"%x\r\n%s\r\n" % (len(piece), piece)

    first = send_raw(demo, head, pieces())
    assert " 413 " in first or (first == "closed" and told), first
    grown = demo.peak() - before
    print(f"{path}: {grown} kB more")
    assert grown < 50_000
    wait_for(lambda: set(demo.uploads) == files_before, timeout=5)
    assert fetch(demo, "/config")[0] == 200


def test_what_was_uploaded_is_swept_away(forks: ForkServer, trained: Run, tmp_path: Path) -> None:
    before = "from vit_finetune import demo\ndemo.SWEEP = (1, 1)\n"
    with served(forks, tmp_path, trained.path, before=before) as demo:
        answer_of(demo, CHINA)
        wait_for(lambda: not demo.uploads, timeout=20, pause=0.1)


def test_who_comes_to_a_long_queue_is_told(forks: ForkServer, trained: Run, tmp_path: Path) -> None:
    slow = (
        "import time\nfrom vit_finetune import demo\ndemo.LONGEST_QUEUE = 2\n"
        "quick = demo.classify\n"
        "demo.classify = lambda *values: time.sleep(1) or quick(*values)\n"
    )
    with served(forks, tmp_path, trained.path, before=slow) as demo, demo.client() as client:
        jobs = [client.submit(handle_file(str(CHINA)), api_name="/predict") for _ in range(8)]
        failed = [str(error) for job in jobs if (error := job.exception(timeout=30))]
        assert 1 <= len(failed) <= 6
        assert all("Queue is full" in error for error in failed)


# --------------------------------------------------------------------------- what is said


def test_a_public_page_is_warned_of_and_shows_no_data(
    forks: ForkServer, trained: Run, tmp_path: Path
) -> None:
    with served(forks, tmp_path, trained.path, "--host", "0.0.0.0") as demo:
        assert "warning: the page is open to everybody who reaches this machine" in demo.child.stderr
        told = fetch(demo, "/config", Host="photos.example")[1]  # others call it by other names
        kinds = [one["type"] for one in json.loads(told)["components"]]
        assert "gallery" not in kinds and "label" in kinds


def test_a_model_without_data_shows_none(forks: ForkServer, trained: Run, tmp_path: Path) -> None:
    with served(forks, tmp_path, trained.model) as demo:
        assert "warning" not in demo.child.stderr
        kinds = [one["type"] for one in json.loads(fetch(demo, "/config")[1])["components"]]
        assert "gallery" not in kinds and "label" in kinds


def ended(forks: ForkServer, folder: Path, *words: object) -> tuple[int, str]:
    """Exit code and words of a command that ends by itself."""
    child = forks.start(folder, *words)
    return child.wait(), child.stderr


def test_an_address_that_cannot_be_had_is_named(forks: ForkServer, trained: Run, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, said = ended(forks, tmp_path / "1", "demo", trained.path, "--port", port)
    assert (code, said) == (
        1,
        f"error: 127.0.0.1, port {port}: Address already in use. Say another --port\n",
    )
    code, said = ended(forks, tmp_path / "2", "demo", trained.path, "--host", "no.such.host.invalid")
    assert code == 1 and "no.such.host.invalid: no such host. Expected an address of this machine" in said
    code, said = ended(forks, tmp_path / "3", "demo", trained.path, "--host", "192.0.2.7")
    assert code == 1 and "Expected an address of this machine" in said


def test_wrong_words_and_no_model_are_refused(forks: ForkServer, tmp_path: Path) -> None:
    code, said = ended(forks, tmp_path / "1", "demo", "runs/none", "--private")
    assert code == 2 and "--private is for a Space" in said
    code, said = ended(forks, tmp_path / "2", "demo", "runs/none", "--port", "0")
    assert code == 2
    code, said = ended(forks, tmp_path / "3", "demo", tmp_path / "none")
    assert code == 1 and "no such model folder" in said


def test_without_gradio_it_is_said_how_to_get_it(forks: ForkServer, trained: Run, tmp_path: Path) -> None:
    child = forks.start(
        tmp_path / "said",
        *("demo", trained.path, "--port", free_port()),
        before="import sys\nsys.modules['gradio'] = None\n",
    )
    assert child.wait() == 1
    assert "the page needs gradio: pip install 'vit-finetune[demo]'" in child.stderr
