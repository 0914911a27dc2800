"""The command line: parse, call, print."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dreamkit.errors import DreamkitError, did_you_mean
from dreamkit.plugins import build_registries
from dreamkit.registry import KINDS, Registries, UnknownEntry
from dreamkit.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Move knowledge out of a trained network when its training data is gone.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

bench = typer.Typer(no_args_is_help=True, help="Measure what there is on this machine.")
app.add_typer(bench, name="bench")

lut = typer.Typer(no_args_is_help=True)
app.add_typer(lut, name="lut")

RecipeFile = Annotated[Path, typer.Argument(help="A recipe, e.g. recipes/quickstart.yaml")]
Preset = Annotated[
    str | None, typer.Option(help="A preset of the recipe, e.g. smoke; several: smoke+mine")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a value: synthesis.images=64 (repeatable)"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON")]
Plugins = Annotated[
    list[str] | None, typer.Option("--plugin", help="Load this module or .py file too (repeatable)")
]


def main() -> None:
    """Run the command line; a user's mistake is one message and exit status 2."""
    try:
        app()
    except DreamkitError as error:
        rank = os.environ.get("RANK", "0")
        print(f"{'' if rank == '0' else f'rank {rank}: '}error: {error}", file=sys.stderr)
        sys.exit(2)


def _version(asked: bool) -> None:
    if asked:
        print(f"dreamkit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version")
    ] = False,
) -> None:
    """Hold options of the program itself."""


def _registries(plugins: list[str] | None) -> Registries:
    registries = build_registries(plugins or [])
    _warn(registries)
    return registries


def _warn(registries: Registries) -> None:
    for failure in registries.failures:
        print(f"warning: plugin {failure.plugin} is left out: {failure.reason}", file=sys.stderr)


@app.command()
def run(
    recipe: RecipeFile,
    preset: Preset = None,
    set_: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="The run directory; runs/NAME[-PRESET] if not given")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Refuse to start afresh")] = False,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Time a few steps, say what dreaming costs, and stop")
    ] = False,
) -> None:
    """Run a recipe; an interrupted run of the same recipe is continued.

    Examples:

        dreamkit run recipes/quickstart.yaml

        dreamkit run recipes/prune_resnet50_ha.yaml --preset smoke --set teacher.weights=null

        dreamkit run my.yaml --set synthesis.images=64 --out runs/try
    """
    from dreamkit import distributed
    from dreamkit.recipe import read_recipe
    from dreamkit.runner import default_folder, dry_run
    from dreamkit.runner import run as run_recipe
    from dreamkit.stopping import Stop
    from dreamkit.store.run_directory import read_report

    loaded = read_recipe(recipe, build_registries, preset, set_ or [])
    _warn(loaded.registries)
    folder, stop = out or default_folder(loaded), Stop()
    try:
        if dry:
            with distributed.ranks():
                if distributed.is_first():
                    dry_run(loaded, folder, Console())
            return
        with stop.listening(), distributed.ranks():
            console = Console(quiet=not distributed.is_first())
            run_recipe(loaded, folder, console, resume, stop.asked)
    except RuntimeError as error:
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            raise
        reason = str(error).strip().partition("\n")[0][:200]
        rank = os.environ.get("RANK")
        print(f"rank {rank} ends: another rank is gone, or torch failed: {reason}", file=sys.stderr)
        raise typer.Exit(stop.status if stop.asked() else 1) from None
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") != "0":
            raise typer.Exit(stop.status) from None
        again = shlex.join(["dreamkit", *sys.argv[1:]])
        print(f"interrupted: what was finished is kept; go on with\n  {again}", file=sys.stderr)
        raise typer.Exit(stop.status) from None
    if read_report(folder).get("failures"):
        raise typer.Exit(1)


@app.command()
def validate(recipe: RecipeFile, preset: Preset = None, set_: Overrides = None) -> None:
    """Check a recipe whole, with every preset, and load nothing.

    Examples:

        dreamkit validate recipes/quickstart.yaml

        dreamkit validate my.yaml --preset paper --set synthesis.images=64
    """
    from dreamkit.recipe import validate_recipe

    registries, missing = validate_recipe(recipe, build_registries, preset, set_ or [])
    _warn(registries)
    for line in missing:
        print(f"warning: {line} (needed to run)", file=sys.stderr)
    print(f"{recipe} is valid")


@app.command("list")
def list_entries(
    kind: Annotated[str | None, typer.Argument(help=f"One of {', '.join(KINDS)}")] = None,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """List the registered entries, what they are and who provides them.

    Examples:

        dreamkit list

        dreamkit list regularizers --json
    """
    kinds = [_checked(kind)] if kind else list(KINDS)
    registries = _registries(plugin)
    rows = [
        {
            "kind": k,
            "name": name,
            "provider": registries[k].provider(name),
            "summary": registries[k].summary(name),
        }
        for k in kinds
        for name in registries[k]
    ]
    _print_rows(rows, as_json)


@app.command()
def show(
    kind: Annotated[str, typer.Argument(help=f"One of {', '.join(KINDS)}")],
    name: Annotated[str, typer.Argument(help="An entry's name")],
    plugin: Plugins = None,
) -> None:
    """Show an entry: what it does and its options.

    Examples:

        dreamkit show regularizers bn_feature

        dreamkit show applications prune
    """
    from dreamkit.recipe.signature import documentation

    registry = _registries(plugin)[_checked(kind)]
    try:
        cls = registry.resolve(name)
    except UnknownEntry as error:
        raise DreamkitError(str(error)) from error
    console = Console()
    console.print(f"{kind} {name} (from {registry.provider(name)})\n", highlight=False)
    console.print(documentation(cls), markup=False, highlight=False)
    _print_options(cls, console)


def _print_options(cls: type[Any], console: Console) -> None:
    from dreamkit.recipe.signature import describe, documentation, nested_options, options_of

    try:
        options = options_of(cls).values()
    except TypeError as error:
        raise DreamkitError(f"its options cannot be read: {error}") from error
    if not options:
        return
    table = Table("option", "type", "default")
    for option in options:
        default = "required" if option.required else _plain(option.default)
        table.add_row(option.name, escape(describe(option.annotation)), escape(default))
    console.print(table)
    for nested in (c for option in options for c in nested_options(option.annotation)):
        console.print(
            f"\n{nested.__name__}: {documentation(nested)}", markup=False, highlight=False
        )
        _print_options(nested, console)


@app.command()
def plugins(as_json: AsJson = False, plugin: Plugins = None) -> None:
    """List who provides entries, and the plugins that could not be loaded.

    Examples:

        dreamkit plugins

        dreamkit plugins --plugin plugins/high_freq.py
    """
    registries = _registries(plugin)
    rows: list[dict[str, Any]] = [
        {
            "provider": provider,
            "status": "loaded",
            "entries": ", ".join(
                f"{kind}: {name}"
                for kind in KINDS
                for name in registries[kind]
                if registries[kind].provider(name) == provider
            ),
        }
        for provider in registries.providers
    ]
    rows += [
        {"provider": f.plugin, "status": "failed", "entries": f.reason} for f in registries.failures
    ]
    _print_rows(rows, as_json)


@app.command("export-dreams")
def export_dreams(
    run_directory: Annotated[Path, typer.Argument(help="A run directory, or its dreams folder")],
    out: Annotated[Path, typer.Argument(help="An empty or new folder")],
) -> None:
    """Write a run's dreams as PNG files, one folder a class, as torchvision's ImageFolder reads.

    Example:

        dreamkit export-dreams runs/quickstart digits_dreamed
    """
    from dreamkit.store.dreams import DreamStore
    from dreamkit.store.picture_files import export_dreams as export
    from dreamkit.store.run_directory import read_report
    from dreamkit.store.source import find_store

    folder = find_store(run_directory)
    names = None
    if folder != run_directory and (run_directory / "report.json").is_file():
        names = read_report(run_directory)["teacher"]["class_names"]
    print(f"{export(DreamStore(folder), out, names)} images written to {out}")


@app.command()
def export(
    run_directory: Annotated[
        Path, typer.Argument(help="A finished run's directory, or its student folder")
    ],
    format_: Annotated[
        str, typer.Option("--format", help="Of the file; see 'dreamkit list exporters'")
    ] = "onnx",
    out: Annotated[
        Path | None, typer.Option(help="The file; beside the student if not given")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images it takes at once [default: any number]")
    ] = None,
    allow_builder: Annotated[
        bool, typer.Option(help="Run the builder function that the student names; see the README")
    ] = False,
) -> None:
    """Export a run's student, run the file, and compare it with the model.

    A file that does not do what the model does is not written.

    Examples:

        dreamkit export runs/quickstart

        dreamkit export runs/quickstart --format torch-export --batch-size 1
    """
    from dreamkit.deploy.exporting import export_student, show_exported

    show_exported(export_student(run_directory, format_, out, batch_size, allow_builder), Console())


@app.command()
def verify(
    run_directory: Annotated[Path, typer.Argument(help="A run's directory, finished or not")],
) -> None:
    """Check a run's dreams, students and checkpoints against their SHA-256; exit status 1 if not.

    Example:

        dreamkit verify runs/quickstart
    """
    from dreamkit.checkup.verifying import show_findings, verify_run

    if not show_findings(verify_run(run_directory), Console()):
        raise typer.Exit(1)


@app.command()
def doctor(
    teacher: Annotated[str, typer.Argument(metavar="SOURCE:MODEL", help="E.g. timm:resnet50")],
    weights: Annotated[
        Literal["default", "null"],
        typer.Option(help="null: random ones, nothing is downloaded"),
    ] = "null",
    batch_size: Annotated[int, typer.Option(min=1, help="Images inverted together")] = 8,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where")] = "auto",
    plugin: Plugins = None,
) -> None:
    """Say what of a teacher can be inverted and pruned, what cannot and why, and at what cost.

    Examples:

        dreamkit doctor torchvision:resnet50

        dreamkit doctor timm:hrnet_w18_small --batch-size 2
    """
    from dreamkit.checkup.doctor import diagnose, show_diagnosis
    from dreamkit.devices import choose_device
    from dreamkit.teacher_bench import load_named

    found = load_named(_registries(plugin), "TEACHER", teacher, weights)
    console = Console()
    show_diagnosis(found.card, diagnose(found, choose_device(device), batch_size), console)


@lut.callback()
def _lut() -> None:
    """Measure layers' latencies on this machine."""
    # oneDNN keeps 1,024 compiled kernels. Networks that are timed in turn have more, and a cache
    # that is too small by one recompiles all; it reads this before its first.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")


@lut.command("build")
def lut_build(
    teacher: Annotated[str, typer.Argument(metavar="SOURCE:MODEL", help="E.g. timm:resnet50")],
    out: Annotated[Path, typer.Option(help="The table's file, gone on with if it is there")],
    backend: Annotated[
        str, typer.Option(help="torch-cpu, torch-cuda, onnxruntime or a plugin's")
    ] = "torch-cpu",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images in a forward pass [default: the backend's, 1]")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Pinned [default: all]")] = None,
    least: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of a layer's channels that may be left")
    ] = 0.1,
    plugin: Plugins = None,
) -> None:
    """Measure every distinct layer of a network over channel counts, on this machine.

    A recipe uses the table with 'application.latency_table'.

    Examples:

        dreamkit lut build torchvision:resnet50 --out resnet50.json

        dreamkit lut build cifar:resnet20 --backend onnxruntime --threads 1 --out edge.json
    """
    from dreamkit.lut_building import build_for

    try:
        build_for(_registries(plugin), teacher, out, backend, batch_size, threads, least, Console())
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept, the same command goes on", file=sys.stderr)
        raise typer.Exit(130) from None


@lut.command("show")
def lut_show(
    table: Annotated[Path, typer.Argument(help="A table's file")],
    teacher: Annotated[
        str | None,
        typer.Option(metavar="SOURCE:MODEL", help="Hold the table against this network, measured"),
    ] = None,
    variants: Annotated[int, typer.Option(min=2, help="Random prunings of it")] = 20,
    seed: Annotated[int, typer.Option(help="Of what they lose")] = 0,
    seconds: Annotated[
        float, typer.Option(min=0, help="Not timed once more after as long, sure or not")
    ] = 900,
    plugin: Plugins = None,
) -> None:
    """Print a latency table, and how well it predicts whole networks.

    Networks are timed in turn until their means are sure to half a percent on average, or
    for a quarter of an hour.

    Examples:

        dreamkit lut show resnet50.json

        dreamkit lut show resnet50.json --teacher torchvision:resnet50 --variants 20
    """
    from dreamkit.lut_building import check_for, show_table

    console = Console()
    show_table(table, console)
    if teacher is not None:
        check_for(_registries(plugin), teacher, table, variants, seed, seconds, console)


@bench.command("teachers")
def bench_teachers(
    source: Annotated[
        list[str] | None,
        typer.Option(
            help="timm, torchvision, cifar, bundled, a plugin's (repeatable) "
            "[default: the first two]"
        ),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB", help="Only models like this, e.g. 'resnet*' (repeatable) [default: all]"
        ),
    ] = None,
    weights: Annotated[
        Literal["default", "null"],
        typer.Option(help="null: random ones, for costs alone; nothing is downloaded"),
    ] = "default",
    json_: Annotated[
        Path, typer.Option("--json", help="Where results go, and are gone on with")
    ] = Path("runs/bench_teachers.json"),
    seconds_per_model: Annotated[
        float, typer.Option(min=1, help="Time for a teacher, its start and download included")
    ] = 60,
    batch_size: Annotated[int, typer.Option(min=1, help="Images inverted together")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the inversion")] = 200,
    verifier: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE:MODEL", help="Classifies the dreams of teachers with the same classes"
        ),
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where")] = "auto",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many of what is chosen")
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Measure what teachers cost to invert, and how good their dreams are; one row a teacher.

    BatchNorm layers, parameters, FLOPs (a multiply-add counted once), latency of one image,
    seconds per step of the inversion, images/s = batch size / (steps × seconds per step), peak
    memory and, with weights, R_feature and cross-model accuracy of a batch of dreams. What cannot
    be measured is a row with the reason. Each teacher has a process of its own, which is stopped
    when its time is up; given again, the command goes on with what is missing.

    Examples:

        dreamkit bench teachers --source bundled

        dreamkit bench teachers --models 'resnet*' --models 'regnet*' --weights null

        dreamkit bench teachers --source torchvision --verifier torchvision:mobilenet_v2
    """
    from dreamkit.teacher_bench import draw, resolve_settings, select, show, sweep

    registries, console = _registries(plugin), Console()
    chosen = select(registries, source or ["timm", "torchvision"], models or [], weights, limit)
    settings = resolve_settings(registries, weights, batch_size, steps, verifier, device)
    try:
        rows = sweep(registries, chosen, settings, json_, seconds_per_model, console, plugin or [])
    except KeyboardInterrupt:
        print("interrupted: finished teachers are kept, the same command goes on", file=sys.stderr)
        raise typer.Exit(130) from None
    show(rows, settings, console)
    picture = draw(json_, settings)
    print(f"results: {json_}")
    print(f"plot: {picture}" if picture else "no plot: no teacher was inverted")


def _checked(kind: str) -> str:
    if kind not in KINDS:
        hint = did_you_mean(kind, KINDS)
        raise DreamkitError(f"no kind '{kind}'{hint} (kinds: {', '.join(KINDS)})")
    return kind


def _plain(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        return "its own defaults"
    return json.dumps(value, default=repr)


def _print_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    if rows:
        table = Table(*rows[0])
        for row in rows:
            table.add_row(*(escape(str(value)) for value in row.values()))
        Console().print(table)
