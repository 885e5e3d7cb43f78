"""The verbs: parse the words, call one function, show the answer."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from typing import Annotated, Any, Literal

import typer

from vit_finetune import __version__
from vit_finetune.console import answer, fail, show_table
from vit_finetune.guarding import answer_signals, guarded, listen
from vit_finetune.recipe import Recipe, RecipeError, build_data_config, bundled_recipes, load_recipe
from vit_finetune.reports import all_scores
from vit_finetune.run import Run, RunError
from vit_finetune.search_space import build_search

app = typer.Typer(
    help="One recipe file takes a folder of images to an evaluated, documented Vision Transformer.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: importing rich for it takes longer than all the rest
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or a bundled recipe's name.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="key=value", help="Recipe keys to set, such as data.path=photos/."),
]
Target = Annotated[
    str,
    typer.Argument(metavar="RUN|MODEL", help="A run or model folder, or a Hub id: owner/name[@revision]."),
]
Calibrated = Annotated[
    bool, typer.Option("--calibrated", help="With the temperature that evaluation.calibrate fitted.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


@app.command()
def check(
    recipe: RecipeName,
    overrides: Overrides = None,
    output: Annotated[
        str | None,
        typer.Option(help="Folder for findings.json and checkup.html; OUTPUT_DIR-checkup if left out."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Look at data, recipe and machine; train nothing."""
    loaded = _load(recipe, overrides)

    def work() -> None:
        from vit_finetune.checking import check

        facts = check(loaded, output)
        _print_json(facts, as_json)
        if "stops" in facts:
            raise RunError(facts["stops"])

    guarded(work, debug)


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run that is there.")] = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a model and score it."""
    loaded = _load(recipe, overrides)

    def work() -> None:
        listen()
        Run(loaded.output_dir).check_free(resume)  # at once, before the seconds that the imports take
        from vit_finetune.finetuning import finetune

        finetune(loaded, resume=resume, command=_command())

    guarded(work, debug)


@app.command()
def evaluate(
    target: Target,
    data: Annotated[str | None, typer.Option(help="Images to score on; a run's own if left out.")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    calibrated: Calibrated = False,
    image_size: Annotated[
        list[int] | None,
        typer.Option(metavar="PIXELS", min=1, help="Also at another image size; repeatable."),
    ] = None,
    corruptions: Annotated[
        bool, typer.Option("--corruptions", help="Also on images made worse: noise, blur, JPEG …")
    ] = False,
    output: Annotated[
        str, typer.Option(metavar="FILE", help="The page of sizes and corruptions.")
    ] = "robustness.html",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Score a run or a model again, on its own or other images."""
    if calibrated and (image_size or corruptions):
        fail("--calibrated goes with neither --image-size nor --corruptions; leave it out")
        raise typer.Exit(2)

    def work() -> None:
        if image_size or corruptions:
            from vit_finetune.robustness import evaluate_robustness

            found = evaluate_robustness(target, data, split, image_size or [], corruptions, output)
            _print_json(found, as_json)
            return
        from vit_finetune.evaluation.scoring import evaluate

        report = evaluate(target, data, split, calibrated=calibrated)
        _print_json(json.loads(report.to_json()), as_json)
        if as_json:
            return
        title = f"{target} on {data or 'its own images'}: {report.split}"
        show_table(title, ["score", ""], all_scores(report))

    guarded(work, debug)


@app.command()
def predict(
    target: Target,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE|FOLDER", help="Images to classify.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to name for each.")] = 5,
    calibrated: Calibrated = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Classify images."""

    def work() -> None:
        from vit_finetune.evaluation.prediction import predict

        found = predict(target, images, top, calibrated)
        _print_json(found, as_json)
        if as_json:
            return
        for image in found:
            classes = ", ".join(f"{p['label']} {p['probability']:.3f}" for p in image["predictions"])
            if "labels" in image:  # of several labels, those above their thresholds
                classes = f"{', '.join(image['labels']) or 'no label'} ({classes})"
            answer(f"{image['path']}: {classes}")

    guarded(work, debug)


@app.command()
def tune(
    recipe: RecipeName,
    overrides: Overrides = None,
    search: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUES", help="A key to search: KEY=low..high or KEY=[a, b]; repeatable."),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="How many trials to make in all.")] = 20,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the trials that are there.")] = False,
    debug: Debug = False,
) -> None:
    """Search over a few recipe keys by the validation split."""
    loaded = _load(recipe, overrides)
    try:
        dimensions = build_search(loaded, search or [])
    except RecipeError as error:
        fail(str(error))
        raise typer.Exit(2) from None

    def work() -> None:
        listen()
        from vit_finetune.tuning import tune

        tune(loaded, dimensions, trials, resume=resume)

    guarded(work, debug)


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN…", help="Folders of finished runs.")],
    output: Annotated[str, typer.Option(metavar="FILE", help="The page to write.")] = "comparison.html",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Put runs side by side: scores, paired tests, costs, and images that only one gets right."""

    def work() -> None:
        from vit_finetune.comparing import compare

        document = compare(runs, output)
        _print_json(document, as_json)

    guarded(work, debug)


@app.command("upload-data")
def upload_data(
    data: Annotated[
        str, typer.Argument(metavar="FOLDER", help="A folder of images, an archive, a table or shards.")
    ],
    repo_id: Annotated[str, typer.Argument(metavar="ID", help="owner/name of the dataset on the Hub.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="key=value", help="How to read it, such as data.group=patient."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Only its owners see it.")] = False,
    license: Annotated[
        str | None, typer.Option(metavar="ID", help="The images' licence, such as cc-by-4.0.")
    ] = None,
    with_gps: Annotated[
        bool, typer.Option("--with-gps", help="Publish also images that tell where they were taken.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show files and card; publish nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Publish images as a dataset of the Hub."""
    try:
        config = build_data_config(data, overrides or [])
    except RecipeError as error:
        fail(str(error))
        raise typer.Exit(2) from None

    def work() -> None:
        from vit_finetune.publishing.dataset import upload_data

        upload_data(config, repo_id, private, license, with_gps, dry_run)

    guarded(work, debug)


@app.command()
def explain(
    target: Target,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE|FOLDER", help="Images to look at.")],
    output: Annotated[str | None, typer.Option(help="Folder; RUN/explanations if left out.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show where a model looks in images."""

    def work() -> None:
        from vit_finetune.explaining import explain

        found = explain(target, images, output)
        _print_json(found, as_json)

    guarded(work, debug)


@app.command()
def demo(
    target: Target,
    space: Annotated[
        str | None, typer.Option(metavar="ID", help="Publish the page as this Space: owner/name.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to bind to; 0.0.0.0 opens it to others.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="The first free one from 7860 on if left out.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Only its owners see the Space.")] = False,
    debug: Debug = False,
) -> None:
    """Open a page that classifies the images dropped on it."""
    if private and space is None:
        raise typer.BadParameter("--private is for a Space: say --space owner/name too")

    def work() -> None:
        listen()  # or what was uploaded would be left behind
        from vit_finetune.demonstrating import publish_space, serve_demo

        if space is not None:
            publish_space(target, space, private or None)
        else:
            serve_demo(target, host, port)

    guarded(work, debug)


@app.command()
def export(
    target: Target,
    quantize: Annotated[Literal["int8"] | None, typer.Option(help="Also write a file in int8.")] = None,
    data: Annotated[str | None, typer.Option(help="Images to compare on; a run's own if left out.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder to write; RUN/onnx if left out.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write an ONNX file, measured against the model, and a script that uses it."""

    def work() -> None:
        from vit_finetune.exporting import export

        facts = export(target, data, quantize, output)
        _print_json(facts, as_json)

    guarded(work, debug)


@app.command()
def push(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    repo: Annotated[str | None, typer.Option(metavar="ID", help="Where to: owner/name.")] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Who may see a new one.")] = None,
    license: Annotated[str | None, typer.Option(metavar="ID", help="Such as apache-2.0.")] = None,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Branch to push to.")] = None,
    tag: Annotated[str | None, typer.Option(help="Git tag for this run's commit.")] = None,
    create_pr: Annotated[
        bool | None, typer.Option("--create-pr", help="Open a pull request instead.")
    ] = None,
    verify: Annotated[
        str | None,
        typer.Option(help="Test images to score again after the download: sample, full or files (none)."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Publish files that were edited after scoring; the card says so.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show files and card; send nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Publish a run's model on the Hub; options left out are the recipe's `hub:`."""
    said = {"model_id": repo, "private": private, "license": license, "revision": revision, "tag": tag}
    said |= {"create_pr": create_pr, "verify": verify}
    overrides = [f"hub.{key}={json.dumps(value)}" for key, value in said.items() if value is not None]
    recipe = Run(run).recipe
    hub = _load(str(recipe), overrides).hub if recipe.is_file() else None

    def work() -> None:
        listen()  # or what was downloaded to be verified would be left behind
        from vit_finetune.pushing import push_to_hub

        push_to_hub(run, hub, force=force, dry_run=dry_run)

    guarded(work, debug)


@app.command()
def recipes() -> None:
    """List the recipes that come with the package."""
    for name, path in bundled_recipes().items():
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        answer(f"{name:<20} {first}")


def _version(value: bool) -> None:
    if value:
        answer(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def _load(recipe: str, overrides: list[str] | None) -> Recipe:
    try:
        return load_recipe(recipe, overrides or [])
    except RecipeError as error:
        fail(str(error))
        raise typer.Exit(2) from None


def _print_json(value: Any, wanted: bool) -> None:
    if wanted:
        answer(json.dumps(value, indent=2, ensure_ascii=False))


def _command() -> str:
    return shlex.join(["vit-finetune", *sys.argv[1:]])


def main() -> None:
    """The command `vit-finetune`."""
    try:
        app(prog_name="vit-finetune")
    except SystemExit as end:
        if end.code != 1:  # nothing is left to break off: a late signal does not change the answer
            answer_signals(signal.SIG_IGN)
        raise
    except KeyboardInterrupt:  # before the work began
        sys.exit(130)
