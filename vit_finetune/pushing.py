"""An evaluated model to the Hub in one commit, and the proof that what strangers get is what was scored."""

from __future__ import annotations

import glob
import re
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path

import datasets

from vit_finetune.console import answer, say, warn
from vit_finetune.data.sources.folders import first_of
from vit_finetune.files import is_disk_full, sha256_of
from vit_finetune.hub_repos import download_model, parse_hub_id, quiet_client
from vit_finetune.publishing.card import (
    build_eval_entries,
    publishable_card,
    publishable_license,
    smallest_card,
)
from vit_finetune.publishing.hub import (
    Access,
    Commit,
    Files,
    check_access,
    check_card,
    check_tag_free,
    commit_files,
    set_tag,
)
from vit_finetune.publishing.record import memory, one_line
from vit_finetune.recipe import HubConfig, ModelConfig, load_recipe
from vit_finetune.run import Interrupted, Run, RunError

RUNNING = {".py", ".pyc", ".so", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"}
"""Suffixes of files that run code when they are loaded, or may."""
STALE = re.compile(
    r"(?:model|pytorch_model|tf_model|flax_model)(?:-\d+-of-\d+)?"
    r"\.(?:safetensors|bin|h5|msgpack)(?:\.index\.json)?"
    r"|\.eval_results/[^/]+--[^/]+\.yaml"
)
"""What `from_pretrained` looks for beside the weights that are published, and scores of an earlier model."""


def check_destination(hub: HubConfig, model: ModelConfig) -> None:
    """Makes sure, before anything is trained, that a model may be pushed there; changes nothing.

    Args:
        hub: where to, and how.
        model: what it is trained from.

    Raises:
        RunError: it may not, and why.
    """
    assert hub.model_id is not None  # `hub.push` needs it
    _check_base(model)
    with quiet_client():
        _check(hub, hub.model_id, None)


def push_to_hub(
    target: str | Path,
    hub: HubConfig | None = None,
    *,
    force: bool = False,
    dry_run: bool = False,
    test_split: datasets.Dataset | None = None,
) -> Commit | None:
    """The commit that publishes a run's model: `model/` with its card, and nothing else.

    Afterwards it is downloaded into an empty cache, loaded with `pipeline`, and compared with the report.
    Interrupted, it is completed by saying the same again.

    Args:
        target: a finished run.
        hub: where to, and how; the run's own recipe's section if None.
        force: whether to publish files that are not those that were scored; the card then says so.
        dry_run: whether only to show what would be sent; answers None.
        test_split: the run's test images, where they are at hand; read from the recipe's data if None.

    Raises:
        RunError: no test report, files edited after scoring, no permission, a fault of the Hub's that does
            not pass, or what was downloaded is not what was scored.
    """
    run = Run(target)
    edited = _check_run(run, force)
    recipe = load_recipe(run.recipe)
    _check_base(recipe.model)
    hub = hub or recipe.hub
    if not hub.model_id:
        raise RunError(
            f"{run.path}: its recipe names no repository: say --repo owner/name, or set hub.model_id"
        )
    files = Files(_contents(run, hub, edited))
    if not publishable_license(run, hub):
        warn(
            "the card names no license, so nobody knows what they may do with it: set hub.license, or say "
            "--license ID"
        )
    if dry_run:
        _show(files)
        return None
    try:
        return _publish(run, hub, hub.model_id, files, test_split)
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Interrupted) else signal.SIGINT
        raise Interrupted(
            f"{run.path}: stopped while it was being published; saying the same again completes it", number
        ) from None


def _publish(
    run: Run, hub: HubConfig, repo_id: str, files: Files, test_split: datasets.Dataset | None
) -> Commit:
    """The commit that holds the files, which are verified."""
    with quiet_client():
        access = _check(hub, repo_id, files)
        if hub.verify != "files" and test_split is None:
            test_split = _test_images(run)  # before anything is sent: what cannot be proven is not published
        commit = commit_files(
            repo_id,
            "model",
            files,
            _is_stale,
            f"Upload {one_line(run.path.resolve().name)} with vit-finetune",
            private=hub.private,
            revision=hub.revision,
            pr_author=access.user if hub.create_pr else None,
        )
        say(f"published: {commit.address} ({_sent(commit, files)})")
        if hub.tag is not None:
            set_tag(repo_id, hub.tag, commit, files)
        _verify(run, commit, files, test_split if hub.verify != "files" else None, hub.verify == "full")
    return commit


def _check_run(run: Run, force: bool) -> list[str]:
    """The files that are no longer what was scored, which without `force` must be none."""
    if not run.exists():
        raise RunError(f"{run.path}: there is no run. Expected the folder that `vit-finetune train` wrote")
    if not run.report("test").is_file():
        raise RunError(
            f"{run.path}: there is no test report, and a model that was not tested is not published. "
            f"Train with images to test on (data.test_fraction, or a folder test/), or let the run end with "
            f"--resume"
        )
    then, now = run.read_provenance().get("scored", {}), run.sum_scored()
    edited = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    kept = [name for name in edited if not name.startswith("model/") or name not in now]
    if kept or (edited and not force):
        raise RunError(
            f"{run.path}: {first_of(edited)} {'is' if len(edited) == 1 else 'are'} not what was there after "
            f"scoring, so the scores are of something else. "
            + (
                f"Bring back {first_of(kept)} as scoring left it"
                if kept
                else "Bring back the files as they were, or publish them with --force: the card will say so"
            )
        )
    for name in edited:
        _check_forced(run, run.path / name)
    return [name.removeprefix("model/") for name in edited]


def _check_base(model: ModelConfig) -> None:
    """Raises RunError where others could not load what an adapter belongs beside."""
    if model.method == "lora" and not model.lora_merge and parse_hub_id(str(model.path)) is None:
        raise RunError(
            f"model.lora_merge: false publishes an adapter, which needs the checkpoint that it was trained "
            f"beside, and {model.path} is a folder of this machine. Train from a checkpoint on the Hub, or "
            f"with model.lora_merge: true"
        )


def _check_forced(run: Run, path: Path) -> None:
    """Raises RunError for what is published in no case, though it lies in `model/`."""
    if not path.resolve().is_relative_to(run.model.resolve()):
        raise RunError(
            f"{path} is a link out of the model's folder. Replace it by the file that it stands for"
        )
    if path.suffix.lower() in RUNNING:
        raise RunError(
            f"{path}: a published model runs no code of its own, and has no pickles, which could. Remove it"
        )
    if path.name != one_line(path.name):
        raise RunError(f"{one_line(str(path))}: its name holds what cannot be shown. Rename it")


def _contents(run: Run, hub: HubConfig, edited: Sequence[str]) -> dict[str, Path | bytes]:
    """What the repository shall hold, by path: the model's folder, its card made for the place it goes to."""
    folder: dict[str, Path | bytes] = {
        path.relative_to(run.model).as_posix(): path for path in run.visible_files(run.model)
    }
    papers = {"README.md": publishable_card(run, hub, edited), **build_eval_entries(run)}
    return folder | {name: text.encode() for name, text in papers.items()}


def _is_stale(path: str) -> bool:
    """Whether a file of the repository, none of ours, would be taken for this model's weights or score."""
    return STALE.fullmatch(path) is not None


def _check(hub: HubConfig, repo_id: str, files: Files | None) -> Access:
    """Says where the files will go; `files` is None where they are not made yet."""
    access = check_access(repo_id, "model", hub.private, hub.create_pr)
    if hub.tag is not None and access.exists:
        check_tag_free(repo_id, hub.tag, files)
    check_card(repo_id, files.text("README.md") if files else smallest_card(hub))
    where = f"{repo_id}@{hub.revision}" if hub.revision else repo_id
    state = "a new repository" if not access.exists else "private" if access.private else "public"
    say(f"hub: {where} ({state}), as {access.user}")
    return access


def _show(files: Files) -> None:
    """What would be sent, and the card, on stdout."""
    for path, size in sorted(files.sizes.items()):
        answer(f"{memory(size):>10}  {path}")
    answer(f"\n{files.text('README.md')}")
    say(f"{len(files.sizes)} files, {memory(sum(files.sizes.values()))}; nothing was sent")


def _sent(commit: Commit, files: Files) -> str:
    """What a commit did, in words."""
    if not commit.sent and not commit.deleted:
        return "it held these files already"
    size = memory(sum(files.sizes[path] for path in commit.sent))
    deleted = f"; deleted: {', '.join(commit.deleted)}" if commit.deleted else ""
    return f"{len(commit.sent)} of {len(files.sizes)} files, {size}{deleted}"


# --------------------------------------------------------------------------- the proof


def _test_images(run: Run) -> datasets.Dataset:
    from vit_finetune.evaluation.images import own_split

    try:
        return own_split(run, "test")
    except RunError as error:
        raise RunError(
            f"{error}. Without its test images the model cannot be scored again once it is published; to "
            f"compare files only, say --verify files"
        ) from error


def _verify(run: Run, commit: Commit, files: Files, split: datasets.Dataset | None, whole: bool) -> None:
    """Says that what strangers get is what was scored.

    Raises:
        RunError: it is not.
    """
    wrong = f"{commit.address} is published, but"
    with tempfile.TemporaryDirectory(prefix="vit-finetune-") as cache:
        try:
            patterns = [glob.escape(path) for path in files.sizes]
            folder = download_model(commit.repo_id, commit.oid, Path(cache), patterns)
        except Exception as error:
            if is_disk_full(error):
                raise RunError(
                    f"{wrong} to verify it the disk is full ({cache}). Free some space, and say the same "
                    f"again"
                ) from error
            raise
        other = [
            path
            for path in files.sizes
            if not (folder / path).is_file() or sha256_of(folder / path) != files.sha256(path)
        ]
        if other:
            raise RunError(f"{wrong} {', '.join(other)} arrives as another file than was sent")
        if split is None:
            say(f"verified: {len(files.sizes)} files, downloaded into an empty cache, are as they were sent")
            return
        from vit_finetune.evaluation.verification import verify_scores

        try:
            verified = verify_scores(folder, split, run, whole)
        except RunError as error:
            raise RunError(f"{wrong} {error}") from error
    say(
        f"verified: downloaded into an empty cache, `pipeline` scores {verified.num_images:,} of "
        f"{len(split):,} test images as reported (largest difference of a probability "
        f"{verified.largest_difference:.0e})"
    )
