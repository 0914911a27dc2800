"""Dream images out of a network in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from dreamkit.api.dreams import Dreams, Quality
from dreamkit.api.given_images import ImagesLike
from dreamkit.api.networks import View
from dreamkit.api.results import described
from dreamkit.api.session import Conditions, Session, session
from dreamkit.errors import DreamkitError
from dreamkit.stages.dreaming import dream_into_store
from dreamkit.stages.run_store import report_synthesis, run_store
from dreamkit.synthesizers.stage import default_stages
from dreamkit.types import Images, Synthesis, Teacher

PAPER: Mapping[str, Any] = {
    "parameterisation": {"name": "pixels"},
    "stages": [{"steps": 2000}],
    "lr": 0.05,
    "betas": [0.9, 0.999],
    "schedule": "constant",
    "clip": False,
    "batch_size": 256,
    "regularizers": [
        {"name": "tv", "weight": 2.5e-5},
        {"name": "l2", "weight": 3e-8},
        {"name": "bn_feature", "form": "paper", "weight": 10},
    ],
}
"""What the paper has for CIFAR-10: pixels, 2,000 steps."""


def invert(
    model: nn.Module | Teacher,
    images: int = 1024,
    *,
    size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    class_names: Sequence[str] | Path | None = None,
    preset: Literal["fast", "paper"] = "fast",
    method: str = "deepinversion",
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: bool | None = None,
    out: str | Path | None = None,
    evaluation: ImagesLike | None = None,
    **options: Any,
) -> Dreams:
    """Dream images that a network classifies as asked and knows the feature statistics of.

    DeepInversion (Yin et al., CVPR 2020). The network, its mode and torch's random numbers stay as
    they are.

    Args:
        model: trained; takes normalised images (N, C, H, W), returns logits (N, K). By what it is
            inverted, with BatchNorm or without, its layers decide unless ``regularizers`` do.
        images: how many to dream.
        size: (channels, height, width) of what it takes; timm's and most of torchvision's networks
            know it, and then it may be left out, as ``mean`` and ``std`` may.
        mean: per channel, of pixels in [0, 1], as training normalised them.
        std: per channel, of pixels in [0, 1].
        class_names: of its outputs, in order; or a text file with one a line, or a JSON file.
        preset: what ``options`` are laid over: ``fast``, the method's defaults, or ``paper``, the
            paper's for CIFAR-10.
        method: a registered synthesizer; presets are of ``deepinversion`` alone.
        steps: optimizer steps, in place of the preset's; of several stages each has its share. Of
            another method, its option of that name.
        seed: of everything random; the same seed makes the same dreams on the same machine.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        progress: show notes and a bar; by default on a terminal and in a notebook.
        out: a folder that keeps finished batches: given again, the same call goes on there.
        evaluation: labelled images, to report the network's accuracy.
        **options: the synthesizer's, as in a recipe (``dreamkit show synthesizers deepinversion``),
            e.g. ``batch_size=32, regularizers={"bn_feature": 30, "tv": 1e-3}``.

    Returns:
        The dreams. Interrupted, those that are finished.

    Raises:
        DreamkitError: the network or an option cannot be used; the message names it.

    Example:
        >>> import dreamkit
        >>> digits = dreamkit.load_teacher("bundled:digits_resnet8")
        >>> dreams = dreamkit.invert(digits, 16, steps=20, progress=False)
        >>> dreams.images.shape
        torch.Size([16, 1, 8, 8])
    """
    view = View(size, mean, std, class_names)
    conditions = Conditions(view, seed, device, progress, out, evaluation)
    with session(model, conditions) as work:
        given = {"images": images, **options}
        entry = synthesizer_options(given, work.teacher, preset, method, steps)
        synthesis = work.synthesis(entry, invert)
        settings = {"synthesis": synthesis.settings, "application": {"name": "synthesize"}}
        work.begin(settings)
        try:
            content: Images = dream_into_store(work.teacher, synthesis, work.context)
            interrupted = False
        except KeyboardInterrupt:
            content, interrupted = _finished(work, synthesis), True
        return _dreams(work, content, settings, interrupted)


def synthesizer_options(
    options: Mapping[str, Any],
    teacher: Teacher,
    preset: str = "fast",
    method: str = "deepinversion",
    steps: int | None = None,
) -> dict[str, Any]:
    """Return a synthesizer's entry, as a recipe has it, from a preset and what is laid over it.

    Args:
        options: laid over the preset.
        teacher: the network to be inverted.
        preset: ``fast`` or ``paper``.
        method: a registered synthesizer.
        steps: in place of the preset's, or another method's own.

    Raises:
        DreamkitError: there is no such preset, or it is of another method.
    """
    presets: Mapping[str, Mapping[str, Any]] = {"fast": {}, "paper": PAPER}
    if preset not in presets:
        raise DreamkitError(f"preset: should be fast or paper (got {preset!r})")
    own = method == "deepinversion"
    if preset != "fast" and not own:
        raise DreamkitError(f"preset: it is of deepinversion alone; '{method}' has options")
    made = {**(presets[preset] if own else {}), **options, "name": method}
    if steps is not None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise DreamkitError(f"steps: should be a whole number above 0 (got {steps!r})")
        if "stages" in options:
            raise DreamkitError("steps: leave it out where 'stages' is given: it has steps")
        if own:
            made["stages"] = _scaled(made.get("stages") or _stages_of(teacher), steps)
        else:
            made["steps"] = steps
    return made


def _stages_of(teacher: Teacher) -> list[dict[str, Any]]:
    """Return the stages that a network gets where none are named, as a recipe has them."""
    card = teacher.card
    return [
        {"steps": stage.steps, "size": None if stage.size is None else stage.resolution(card)}
        for stage in default_stages(teacher)
    ]


def _scaled(stages: Sequence[Mapping[str, Any]], steps: int) -> list[dict[str, Any]]:
    """Return stages that share a number of steps as they shared their own."""
    total = sum(stage["steps"] for stage in stages)
    return [{**s, "steps": max(1, round(steps * s["steps"] / total))} for s in stages]


def _finished(work: Session, synthesis: Synthesis) -> Images:
    """Return what was dreamed before an interruption.

    Raises:
        KeyboardInterrupt: no batch was finished.
    """
    store = run_store(work.teacher, synthesis, work.context)
    if len(store) == 0:
        raise KeyboardInterrupt
    report_synthesis(work.context, store, work.teacher)
    work.log.note(f"interrupted: {len(store)} of {synthesis.synthesizer.images} images are there")
    return store.open()


def _dreams(
    work: Session,
    content: Any,
    settings: Mapping[str, Any],
    interrupted: bool,
) -> Dreams:
    images, labels = content.batch(range(len(content)))
    quality = Quality(
        work.log.metrics["synthesis.teacher_accuracy"],
        work.log.metrics.get("synthesis.statistics_distance"),
        work.log.details.get("statistics_distance", {}),
    )
    return Dreams(
        images=images.clone(),
        labels=labels.clone(),
        teacher_logits=content.teacher_logits.float(),
        card=work.teacher.card,
        quality=quality,
        interrupted=interrupted,
        **described(work, settings),
    )
