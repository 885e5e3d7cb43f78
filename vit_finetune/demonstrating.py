"""A model on a page: served on this machine, or published as a Space beside the model."""

from __future__ import annotations

import functools
import ipaddress
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
from huggingface_hub import HfApi
from PIL import Image

from vit_finetune.console import say, warn
from vit_finetune.data.checkup.pictures import open_image, scaled
from vit_finetune.data.images import UnreadableImage
from vit_finetune.data.sources.columns import column_values
from vit_finetune.data.sources.labels import label_names
from vit_finetune.evaluation.images import own_split
from vit_finetune.evaluation.multi_label import read_thresholds
from vit_finetune.evaluation.target import best_device
from vit_finetune.hub_repos import explaining_errors, parse_hub_id, persist, quiet_client, web_address
from vit_finetune.model.loading import is_multi_label, load_checkpoint
from vit_finetune.publishing.hub import Commit, Files, check_access, check_card, commit_files
from vit_finetune.publishing.space import Published, build_space
from vit_finetune.recipe import load_recipe
from vit_finetune.run import Run, RunError

EXAMPLES = 6
"""Pictures of a class."""
EXAMPLE_PIXELS = 192
"""Their longer side."""


# --------------------------------------------------------------------------- on this machine


def serve_demo(target: str | Path, host: str = "127.0.0.1", port: int | None = None) -> None:
    """Serves the page of a model until Ctrl-C or SIGTERM; what was uploaded is deleted then, or earlier.

    Args:
        target: a run folder, a model folder or a Hub id. The page of a run also shows images of its
            validation split (of its training split, where it has none); not to other machines.
        host: address to bind to.
        port: to bind to; the first free one from 7860 on if None.

    Raises:
        RunError: no gradio, no model there, or the address cannot be bound to.
    """
    is_private = check_address(host, port)
    run = Run(target)
    model, image_processor = load_checkpoint(str(run.model if run.exists() else target))
    if is_multi_label(model):
        read_thresholds(model.config)  # refuses what would be no thresholds
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    examples = load_examples(run, names) if run.exists() and is_private else None
    model = model.to(best_device())
    with tempfile.TemporaryDirectory(prefix="vit-finetune-demo-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # read when gradio's components are made
        _reach_directly(host)
        demo = _import_demo()
        page = demo.build_page(_title(target, run), model, image_processor, examples)
        try:
            try:
                address = demo.open_page(page, host, port)
            except OSError as error:
                raise RunError(f"{host}: no page can be served there: {error}. Say another --port") from error
            if not is_private:
                warn(
                    f"the page is open to everybody who reaches this machine by {host}: it asks for no "
                    f"password and sends what is uploaded unencrypted. Images of the run's data are not shown"
                )
            say(f"the page is at {address} (Ctrl-C ends it)")
            threading.Event().wait()
        except KeyboardInterrupt:  # or SIGTERM: a page ends in no other way
            say("the page is closed, and what was uploaded is deleted")
        finally:
            page.close(verbose=False)


def check_address(host: str, port: int | None) -> bool:
    """Whether only this machine reaches an address, which can be bound to.

    Raises:
        RunError: it cannot: it is none of this machine's, or the port is taken.
    """
    try:
        found = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):
        raise RunError(
            f"{host}: no such host. Expected an address of this machine, such as 127.0.0.1 (only it reaches "
            f"the page) or 0.0.0.0 (others can too)"
        ) from None
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                raise RunError(
                    f"{host}, port {port}: {error.strerror}. "
                    + ("Say another --port" if port else "Expected an address of this machine")
                ) from None
    return all(ipaddress.ip_address(str(address[0])).is_loopback for *_, address in found)


def _reach_directly(host: str) -> None:
    """Keeps the server's looking whether it answers from going through a proxy."""
    for name in ("no_proxy", "NO_PROXY"):
        known = os.environ.get(name)
        os.environ[name] = ",".join([*([known] if known else []), host, "127.0.0.1", "localhost"])


def _import_demo() -> ModuleType:
    try:
        from vit_finetune import demo
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise RunError("the page needs gradio: pip install 'vit-finetune[demo]'") from None
    return demo


def _title(target: str | Path, run: Run) -> str:
    return run.path.resolve().name if run.path.is_dir() else str(target)


def load_examples(run: Run, names: Sequence[str]) -> Callable[[int], list[Image.Image]] | None:
    """What gives small pictures of a class, by its id in the model; None where the run's data is gone.

    They are of the validation split, or else of the training split, and never of the test split.

    Args:
        run: a finished run.
        names: the model's classes, in id order.
    """
    splits = run.read_provenance()["data"]["splits"]
    split = "validation" if "validation" in splits else "train"
    try:
        images = own_split(run, split)
    except RunError as error:
        warn(f"the page shows no images of the classes: {error}")
        return None
    own_names = label_names(images)
    labels = column_values(images, "label")

    @functools.cache
    def pictures(number: int) -> list[Image.Image]:
        wanted = own_names.index(names[number]) if names[number] in own_names else -1
        rows = (
            row
            for row, label in enumerate(labels)
            if (wanted in label if isinstance(label, list) else wanted == label)
        )
        drawn: list[Image.Image] = []
        for row in rows:
            if len(drawn) == EXAMPLES:
                break
            with suppress(UnreadableImage, OSError):  # the checkup has told of those
                drawn.append(_draw(images, row))
        return drawn

    return pictures


def _draw(images: datasets.Dataset, row: int) -> Image.Image:
    return scaled(Image.fromarray(np.asarray(open_image(images, row).permute(1, 2, 0))), EXAMPLE_PIXELS)


# --------------------------------------------------------------------------- as a Space


def publish_space(target: str | Path, space: str, private: bool | None = None) -> Commit:
    """The commit that makes a Space the page of a model that is on the Hub; no image of the data goes along.

    Interrupted, it is completed by saying the same again.

    Args:
        target: a Hub id, or a run that was pushed to the `hub.model_id` of its recipe.
        space: the Space's `owner/name`.
        private: whether a new Space is; the owner's default if None.

    Raises:
        RunError: the model is not on the Hub, or is another one than the run's; no permission; or a fault of
            the Hub's that does not pass.
    """
    run = Run(target)
    repo_id, revision = _published_id(target, run)
    with quiet_client():
        with explaining_errors(repo_id, "model", revision):
            info = persist(
                f"looking at {repo_id}",
                lambda: HfApi().model_info(repo_id, revision=revision, files_metadata=True),
            )
        names = [file.rfilename for file in info.siblings or []]
        if "adapter_config.json" in names or "config.json" not in names:
            raise RunError(
                f"{repo_id} is no model that a Space can load by itself: expected config.json and "
                f"model.safetensors, and no adapter. Push a run with model.lora_merge: true"
            )
        if run.exists():
            own = Files(
                {
                    path.name: path
                    for path in run.visible_files(run.model)
                    if path.name == "config.json" or path.suffix == ".safetensors"
                }
            )
            if other := own.differing(info.siblings):
                raise RunError(
                    f"{repo_id} holds another model than {run.path}: {', '.join(other)} differs. Push the "
                    f"run first (`vit-finetune push {run.path}`), or say {repo_id} in its place"
                )
        license = info.card_data.get("license") if info.card_data else None
        model = Published(repo_id, str(info.sha), license if isinstance(license, str) else None)
        files = Files(build_space(space, model))
        access = check_access(space, "space", private)
        check_card(space, files.text("README.md"), "space")
        state = "a new Space" if not access.exists else "private" if access.private else "public"
        say(f"hub: {space} ({state}), as {access.user}")
        commit = commit_files(
            space, "space", files, lambda path: False, f"The page of {repo_id}", private=private
        )
    say(f"published: {web_address(space, 'space')} ({len(commit.sent)} of {len(files.sizes)} files were new)")
    if info.private:
        open_to_all = private is not True and not access.private
        warn(
            f"{repo_id} is private: give the Space, in its settings, a secret HF_TOKEN, a token that may "
            f"read this model and nothing else"
            + (f". {space} may be public: then everybody can ask the model" if open_to_all else "")
        )
    return commit


def _published_id(target: str | Path, run: Run) -> tuple[str, str | None]:
    """Where a model is on the Hub, and the branch, tag or commit that is named."""
    if run.exists():
        hub = load_recipe(run.recipe).hub
        if hub.model_id is None:
            raise RunError(
                f"{run.path}: its recipe does not say where the model is on the Hub, and a Space loads it "
                f"from there. Push it with `vit-finetune push`, and say its id in the place of the run"
            )
        return hub.model_id, hub.revision
    named = parse_hub_id(str(target))
    if named is None:
        raise RunError(
            f"{target}: a Space loads its model from the Hub. Expected a run that was pushed, or the model's "
            f"id there: owner/name[@revision]"
        )
    return named
