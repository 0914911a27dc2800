"""Commands that measure: doctor, lut, bench. What makes them long is their options' help."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from dreamkit.cli.arguments import (
    Device,
    Overrides,
    Plugins,
    Preset,
    TeacherName,
    load_network,
    registries_with,
)

bench = typer.Typer(
    no_args_is_help=True,
    help="Compare teachers: what they cost to invert, and how good their dreams are.",
)
lut = typer.Typer(no_args_is_help=True)


def doctor(
    teacher: TeacherName,
    preset: Preset = None,
    set_: Overrides = None,
    weights: Annotated[
        Literal["default", "null"] | None,
        typer.Option(
            help="Of SOURCE:MODEL, use trained weights, or with null random ones: nothing is "
            "downloaded [default: null]."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Invert so many images together.")] = 8,
    device: Device = "auto",
    plugin: Plugins = None,
) -> None:
    """Say whether a teacher can be inverted and pruned, and at what cost.

    What cannot be pruned is listed with the reason.

    Examples:

        dreamkit doctor torchvision:resnet50

        dreamkit doctor timm:hrnet_w18_small --batch-size 2

        dreamkit doctor my.yaml --preset smoke
    """
    print(f"{teacher}: loading it", flush=True)  # before torch is, which takes seconds
    from dreamkit.checkup.doctor import diagnose
    from dreamkit.devices import choose_device
    from dreamkit.plugins import added_rules
    from dreamkit.wording import say

    console = Console()
    found, registries = load_network("NETWORK", teacher, plugin, weights, preset, set_)
    rules = added_rules(registries, partial(say, console))
    diagnose(found, choose_device(device), batch_size, rules, console)


@lut.callback()
def _lut() -> None:
    """Measure layers' latencies on this machine, for recipes to predict with."""
    # oneDNN keeps 1,024 compiled kernels. Networks that are timed in turn have more, and a cache
    # that is too small by one recompiles all; it reads this before its first.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")


@lut.command("build")
def lut_build(
    teacher: TeacherName,
    out: Annotated[Path, typer.Option(help="Write the table here. One that is there is added to.")],
    backend: Annotated[
        str,
        typer.Option(help="Time with torch-cpu, torch-cuda, onnxruntime or a plugin's backend."),
    ] = "torch-cpu",
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Time batches of so many images [default: the backend's, 1]."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Use so many threads [default: all].")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Time in float32 or int8, with onnxruntime [default: float32]."),
    ] = None,
    least: Annotated[
        float,
        typer.Option(
            min=0.01, max=1, help="Serve prunings down to this share of a layer's channels."
        ),
    ] = 0.1,
    preset: Preset = None,
    set_: Overrides = None,
    plugin: Plugins = None,
) -> None:
    """Measure every distinct layer of a network, at many counts of channels.

    A recipe uses the table with `application.latency_table`. An interrupted command goes on when
    given again.

    Examples:

        dreamkit lut build torchvision:resnet50 --out resnet50.json

        dreamkit lut build cifar:resnet20 --backend onnxruntime --threads 1 --out edge.json

        dreamkit lut build cifar:resnet20 --backend onnxruntime --dtype int8 --out int8.json
    """
    from dreamkit.bench.latency_tables import build_for

    found, registries = load_network("NETWORK", teacher, plugin, None, preset, set_)
    try:
        given = {"batch_size": batch_size, "threads": threads, "dtype": dtype}
        options = {name: value for name, value in given.items() if value is not None}
        build_for(registries, found, out, backend, options, least, Console())
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept, the same command goes on", file=sys.stderr)
        raise typer.Exit(130) from None


@lut.command("show")
def lut_show(
    table: Annotated[Path, typer.Argument(help="The table's file.")],
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="NETWORK",
            help="Compare with prunings of this network, measured: SOURCE:MODEL, a recipe or a "
            "saved student.",
        ),
    ] = None,
    preset: Preset = None,
    set_: Overrides = None,
    variants: Annotated[
        int, typer.Option(min=2, help="Measure so many random prunings of it.")
    ] = 20,
    seed: Annotated[int, typer.Option(help="Choose what they lose by this seed.")] = 0,
    seconds: Annotated[
        float, typer.Option(min=0, help="Stop timing after so long, sure or not.")
    ] = 900,
    plugin: Plugins = None,
) -> None:
    """Print a latency table and, given a teacher, how well it predicts whole networks.

    They are timed in turn until their means are sure to half a percent on average.

    Examples:

        dreamkit lut show resnet50.json

        dreamkit lut show resnet50.json --teacher torchvision:resnet50 --variants 20
    """
    from dreamkit.bench.latency_tables import check_for, show_table

    console = Console()
    show_table(table, console)
    if teacher is not None:
        found, registries = load_network("--teacher", teacher, plugin, None, preset, set_)
        check_for(registries, found, table, variants, seed, seconds, console)


@bench.command("teachers")
def bench_teachers(
    source: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure the models of timm, torchvision, cifar, bundled or a plugin's source "
            "(repeatable) [default: the first two, where no recipe is given]."
        ),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RECIPE", help="Measure a recipe's teacher, your own network (repeatable)."
        ),
    ] = None,
    preset: Preset = None,
    set_: Overrides = None,
    models: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB", help="Take only models like this, e.g. 'resnet*' (repeatable)."
        ),
    ] = None,
    weights: Annotated[
        Literal["default", "null"],
        typer.Option(help="Use trained weights, or with null random ones, for costs alone."),
    ] = "default",
    json_: Annotated[
        Path,
        typer.Option("--json", help="Keep the results here; what is there is not measured again."),
    ] = Path("runs/bench_teachers.json"),
    seconds_per_model: Annotated[
        float, typer.Option(min=1, help="Stop a teacher after so long, its download included.")
    ] = 60,
    batch_size: Annotated[int, typer.Option(min=1, help="Invert so many images together.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Invert in so many steps.")] = 200,
    verifier: Annotated[
        str | None,
        typer.Option(
            metavar="NETWORK",
            help="Let this network classify the dreams, where classes are the same: "
            "SOURCE:MODEL, or a recipe, whose teacher is taken.",
        ),
    ] = None,
    device: Device = "auto",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Measure only the first so many.")
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Measure what teachers cost to invert, and how good their dreams are.

    One row a teacher: BatchNorm layers, parameters, FLOPs (a multiply-add counted once), latency
    of one image, seconds per step of the inversion, images/s = batch size / (steps × seconds per
    step), peak memory and, with weights, of a batch of dreams: cross-model accuracy, and how far
    its feature statistics are from training's (1: as near as an equal number of training images).
    What cannot be measured is a row with the reason. Each teacher has a process of its own, which
    is stopped when its time is up. Given again, the command goes on with what is missing.

    Examples:

        dreamkit bench teachers --source bundled

        dreamkit bench teachers --models 'resnet*' --models 'regnet*' --weights null

        dreamkit bench teachers --source torchvision --verifier torchvision:mobilenet_v2

        dreamkit bench teachers --recipe my_model.yaml
    """
    from dreamkit.bench.select import resolve_settings, select
    from dreamkit.bench.show import draw, show
    from dreamkit.bench.sweep import RECIPE, sweep
    from dreamkit.teachers.network_name import NetworkName

    registries, console = registries_with(plugin), Console()
    changes = tuple(set_ or ())
    names = [NetworkName("--recipe", text, None, preset, changes) for text in recipe or []]
    named = {name.label: name for name in names}
    chosen = [(RECIPE, label) for label in named]
    if source or models or not chosen:
        sources = source or ["timm", "torchvision"]
        chosen += select(registries, sources, models or [], weights, limit)
    settings = resolve_settings(registries, weights, batch_size, steps, verifier, device)
    try:
        plugins = plugin or []
        rows = sweep(
            registries, chosen, settings, json_, seconds_per_model, console, plugins, named
        )
    except KeyboardInterrupt:
        print("interrupted: finished teachers are kept, the same command goes on", file=sys.stderr)
        raise typer.Exit(130) from None
    show(rows, settings, console)
    picture = draw(json_, settings)
    print(f"results: {json_}")
    print(f"plot: {picture}" if picture else "no plot: no teacher was inverted")
