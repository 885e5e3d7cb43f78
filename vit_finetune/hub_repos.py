"""Repositories of the Hub: their ids, their files in the cache, and what the Hub's errors mean."""

from __future__ import annotations

import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

from huggingface_hub import HfApi, constants, get_token, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is the HTTP library's
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from vit_finetune.console import say, terminal
from vit_finetune.files import is_disk_full
from vit_finetune.run import RunError

Kind = Literal["model", "dataset", "space"]
Answer = TypeVar("Answer")

MODEL_FILES = [
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
]
"""All that a model, or an adapter to one, needs to be loaded; no code and no pickles."""
PASSING = (408, 412, 429, 500, 502, 503, 504)
"""Answers that may be others the next time; 412: somebody else has just pushed."""
PAUSES = (1.0, 4.0, 10.0)
"""Seconds before each further try, where the Hub does not say how long to wait."""
LONGEST_PAUSE = 120
"""Seconds that the Hub may ask to wait; where it asks for more, the work is given up."""


def parse_hub_id(text: str) -> tuple[str, str | None] | None:
    """Id and revision of `owner/name[@revision]`; None where it is something on this machine, or no id."""
    name, at, revision = text.partition("@")
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    if name.count("/") != 1 or (at and not revision) or Path(text).exists() or Path(name).exists():
        return None
    return name, revision or None


def hub_address() -> str:
    """Where the Hub is, without the password that an address may hold."""
    return re.sub(r"(?<=//)[^/@]*@", "", constants.ENDPOINT)


def web_address(repo_id: str, kind: Kind = "model", commit: str | None = None) -> str:
    """Where people look at a repository."""
    folder = "" if kind == "model" else f"{kind}s/"
    return f"{hub_address()}/{folder}{repo_id}" + (f"/tree/{commit}" if commit else "")


def download_model(
    repo_id: str, revision: str | None = None, cache: Path | None = None, files: list[str] = MODEL_FILES
) -> Path:
    """The folder of a model's files in the cache, named after its commit.

    Args:
        repo_id: `owner/name`.
        revision: branch, tag or commit; the default branch if None.
        cache: where to; the Hub's own cache if None.
        files: their paths, or patterns.

    Raises:
        RunError: it is not to be had.
    """
    with explaining_errors(repo_id, "model", revision):
        fetched = persist(
            f"downloading {repo_id}",
            lambda: snapshot_download(repo_id, revision=revision, cache_dir=cache, allow_patterns=files),
        )
        return Path(fetched)


def commit_of(folder: str) -> str | None:
    """The commit of a folder of the Hub's cache; None of any other."""
    found = re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})$", folder)  # as the cache names its folders
    return found[1] if found else None


def resolve_commit(repo_id: str, revision: str | None, kind: Kind) -> str | None:
    """The commit that a branch or tag stands for now; None in offline mode, where only the cache is asked.

    Raises:
        RunError: there is no such repository or revision, or it is not to be had.
    """
    if constants.is_offline_mode():
        return None
    with explaining_errors(repo_id, kind, revision):
        info = persist(
            f"looking at {repo_id}", lambda: HfApi().repo_info(repo_id, repo_type=kind, revision=revision)
        )
    return str(info.sha)


@contextmanager
def quiet_client() -> Iterator[None]:
    """A block in which the Hub's clients say nothing: their log lines hold addresses, signatures and all.

    Bars of transfers stay where there is a terminal to draw them on; those of `datasets` go.
    """
    import datasets  # here, since it takes long, and ids are asked about without it

    level, bars = hub_logging.get_verbosity(), not are_progress_bars_disabled()
    level_of_data, bars_of_data = (
        datasets.logging.get_verbosity(),
        not datasets.are_progress_bars_disabled(),
    )
    hub_logging.set_verbosity(logging.CRITICAL)
    datasets.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    if not terminal().is_terminal:
        disable_progress_bars()
    try:
        with warnings.catch_warnings():
            # That uploads without Xet, which HF_HUB_DISABLE_XET asks for, are on their way out; that a disk
            # may become full, which is an error as soon as it is.
            for category in (DeprecationWarning, UserWarning):
                warnings.filterwarnings("ignore", category=category, module="huggingface_hub")
            yield
    finally:
        hub_logging.set_verbosity(level)
        datasets.logging.set_verbosity(level_of_data)
        if bars:
            enable_progress_bars()
        if bars_of_data:
            datasets.enable_progress_bars()


# --------------------------------------------------------------------------- errors


@contextmanager
def explaining_errors(repo_id: str, kind: Kind = "model", revision: str | None = None) -> Iterator[None]:
    """A block in which the Hub's errors, and those that they caused, become a message for people.

    Raises:
        RunError: in their place.
    """
    try:
        yield
    except Exception as error:
        message = None if is_disk_full(error) else _explain_chain(error, repo_id, kind, revision)
        if message is None:
            raise
        raise RunError(message) from error


def _explain_chain(error: BaseException, repo_id: str, kind: Kind, revision: str | None) -> str | None:
    """The message for an error or the nearest one that it came from; None where none is the Hub's."""
    seen: BaseException | None = error
    while seen is not None:
        if message := _explain(seen, repo_id, kind, revision):
            return message
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return None


def _explain(error: BaseException, repo_id: str, kind: Kind, revision: str | None) -> str | None:
    login = "log in with `hf auth login`, or set HF_TOKEN"
    match error:
        case LocalTokenNotFoundError():
            return f"{repo_id}: you are not logged in to the Hub. First {login}"
        case GatedRepoError():
            return (
                f"{repo_id} is gated: its owners decide who may have it. Ask them on "
                f"{web_address(repo_id, kind)}" + ("" if get_token() else f", and {login}")
            )
        case RepositoryNotFoundError():
            who = "that your token may not read" if get_token() else f"that needs a token ({login})"
            return (
                f"{repo_id}: there is no such {kind} on the Hub, or it is a private one {who}. Check the name"
            )
        case RevisionNotFoundError():
            return (
                f"{repo_id} has no branch, tag or commit {revision!r}. Those that it has: "
                f"{web_address(repo_id, kind)}"
            )
        case HfHubHTTPError():
            return f"{repo_id}: {_explain_status(error)}"
        case HTTPError() | ConnectionError() if constants.is_offline_mode():
            return (
                f"{repo_id} is not in the cache, and HF_HUB_OFFLINE keeps this command from the network. "
                f"Unset it"
            )
        case HTTPError() if not _is_address(constants.ENDPOINT):
            return (
                f"HF_ENDPOINT is {constants.ENDPOINT}; expected an address, such as "
                f"https://{constants.ENDPOINT}"
            )
        case HTTPError() | ConnectionError():
            return (
                f"{repo_id}: the Hub ({hub_address()}) cannot be reached ({type(error).__name__}). "
                f"Look at the connection, and say the same again"
            )
    return None


def _explain_status(error: HfHubHTTPError) -> str:
    """What an answer of the Hub means, by its status."""
    said = " ".join((error.server_message or "").split())
    status = error.response.status_code
    match status:
        case 401:
            return (
                "the Hub does not know your token; it may have expired. Log in again with `hf auth login`, "
                "or set another HF_TOKEN"
            )
        case 403:
            return f"the Hub does not let your token do that{f' ({said})' if said else ''}"
        case 429:
            wait = _asked_pause(error)
            return "the Hub limits how often it is asked (429). Say the same again " + (
                f"in {wait:.0f} seconds" if wait else "later"
            )
        case _ if status >= 500:
            return (
                f"the Hub is out of order ({status}{f': {said}' if said else ''}). Say the same again later"
            )
    return f"the Hub answers {status}{f': {said}' if said else ''}"


# --------------------------------------------------------------------------- passing faults


def persist(what: str, attempt: Callable[[], Answer]) -> Answer:
    """The answer of a call to the Hub that is tried again, a few times, where a fault may pass.

    Args:
        what: is being done, for the line that says why it takes longer.
        attempt: does it; must be such that doing it twice does no harm.
    """
    for pause in PAUSES:
        try:
            return attempt()
        except (HTTPError, ConnectionError) as error:
            asked = _asked_pause(error) if isinstance(error, HfHubHTTPError) else None
            if not _may_pass(error) or (asked or 0) > LONGEST_PAUSE:
                raise
            seconds = pause if asked is None else asked + 1  # a second for rounding
            reason = (
                f"answers {error.response.status_code}"
                if isinstance(error, HfHubHTTPError)
                else "is not reached"
            )
            say(f"{what}: the Hub {reason}; trying again in {seconds:.0f} s")
            time.sleep(seconds)
    return attempt()


def _may_pass(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in PASSING
    return _is_address(constants.ENDPOINT) and not isinstance(error, OfflineModeIsEnabled)


def _is_address(text: str) -> bool:
    return re.match("https?://", text) is not None


def _asked_pause(error: HfHubHTTPError) -> float | None:
    """Seconds that the Hub asks to wait (RFC 9110's Retry-After, or the draft ratelimit header's `t`)."""
    headers = error.response.headers
    if (after := headers.get("retry-after", "").strip()).isdigit():
        return float(after)
    reset = re.search(r"\bt=(\d+)", headers.get("ratelimit", ""))
    return float(reset[1]) if reset and error.response.status_code == 429 else None
