"""An evaluated model to the Hub in one commit, and the proof that what strangers get is what was scored."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import datasets

from vit_finetune.console import answer, say, warn
from vit_finetune.files import is_disk_full, sha256_of
from vit_finetune.hub_repos import download_model, quiet_client
from vit_finetune.publishing.card import build_eval_entries, publishable_card
from vit_finetune.publishing.hub import Commit, Files, check_access, check_tag_free, commit_files, set_tag
from vit_finetune.publishing.record import memory
from vit_finetune.recipe import HubConfig, load_recipe
from vit_finetune.run import Run, RunError


def check_destination(hub: HubConfig) -> None:
    """Makes sure, before anything is trained, that a model may be pushed there; changes nothing.

    Raises:
        RunError: it may not, and why.
    """
    with quiet_client():
        _check(hub, None)


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
    hub = hub or load_recipe(run.recipe).hub
    if hub.model_id is None:
        raise RunError(
            f"{run.path}: its recipe names no repository: say --repo owner/name, or set hub.model_id"
        )
    files = Files(_contents(run, hub, edited))
    with quiet_client():
        _check(hub, files)
        if hub.license is None:
            warn(
                "the card names no license, so nobody knows what they may do with the model: set hub.license"
            )
        if dry_run:
            _show(files)
            return None
        if hub.verify != "files" and test_split is None:
            test_split = _test_images(run)  # before anything is sent: what cannot be proven is not published
        commit = commit_files(
            hub.model_id,
            "model",
            files,
            _is_stale,
            f"Upload {run.path.resolve().name} with vit-finetune",
            private=hub.private,
            revision=hub.revision,
            create_pr=hub.create_pr,
        )
        say(f"published: {commit.address} ({_sent(commit, files)})")
        if hub.tag is not None:
            set_tag(hub.model_id, hub.tag, commit.oid)
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
    papers = [name for name in edited if not name.startswith("model/")]
    if papers or (edited and not force):
        raise RunError(
            f"{run.path}: {', '.join(edited)} {'is' if len(edited) == 1 else 'are'} not what was there after "
            f"scoring, so the scores are of something else. "
            + (
                "Bring back the reports and predictions as they were"
                if papers
                else "Bring back the files as they were, or publish them with --force: the card will say so"
            )
        )
    return [name.removeprefix("model/") for name in edited]


def _contents(run: Run, hub: HubConfig, edited: Sequence[str]) -> dict[str, Path | bytes]:
    """What the repository shall hold, by path: the model's folder, its card made for the place it goes to."""
    folder: dict[str, Path | bytes] = {
        path.relative_to(run.model).as_posix(): path
        for path in sorted(run.model.rglob("*"))
        if path.is_file()
    }
    papers = {"README.md": publishable_card(run, hub, edited), **build_eval_entries(run)}
    return folder | {name: text.encode() for name, text in papers.items()}


def _is_stale(path: str) -> bool:
    """Whether a file of the repository, none of ours, would be taken for weights of the model."""
    return path.endswith((".safetensors", ".safetensors.index.json", ".h5", ".msgpack")) or (
        path.startswith("pytorch_model") and ".bin" in path
    )


def _check(hub: HubConfig, files: Files | None) -> None:
    """Says where the files will go; `files` is None where they are not made yet."""
    assert hub.model_id is not None
    access = check_access(hub.model_id, "model", hub.private, hub.create_pr)
    if hub.tag is not None and access.exists:
        check_tag_free(hub.model_id, hub.tag, files)
    where = f"{hub.model_id}@{hub.revision}" if hub.revision else hub.model_id
    state = "a new repository" if not access.exists else "private" if access.private else "public"
    say(f"hub: {where} ({state}), as {access.user}")


def _show(files: Files) -> None:
    """What would be sent, and the card, on stdout."""
    for path, size in sorted(files.sizes.items()):
        answer(f"{memory(size):>10}  {path}")
    with files.operations["README.md"].as_file() as card:
        answer(f"\n{card.read().decode()}")
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
    from vit_finetune.evaluation.scoring import own_split

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
            folder = download_model(commit.repo_id, commit.oid, Path(cache), list(files.sizes))
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
