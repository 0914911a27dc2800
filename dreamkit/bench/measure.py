"""Measuring one teacher: what it costs to run and to invert, and how good its dreams are."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dreamkit.bench.results import Settings
from dreamkit.card import Card
from dreamkit.devices import default_backend
from dreamkit.errors import DreamkitError, TeacherMismatch, WeightsUnavailable
from dreamkit.evaluation.cost import count
from dreamkit.model_state import eval_mode
from dreamkit.out_of_memory import is_out_of_memory
from dreamkit.plugins import build_registries
from dreamkit.registry import Registries
from dreamkit.resizing import resized
from dreamkit.stages.batches import as_stored, batch_seed
from dreamkit.stages.statistics_distance import overall
from dreamkit.synthesizers.bn_statistics import batch_norm_layers
from dreamkit.synthesizers.deepinversion import DeepInversion
from dreamkit.synthesizers.engine import Engine
from dreamkit.synthesizers.stage import Stage
from dreamkit.teachers.intake import admit
from dreamkit.teachers.named import load_teacher
from dreamkit.teachers.network_name import NetworkName, load_network
from dreamkit.types import BatchPlan, Dreamer, StoredImages, Teacher
from dreamkit.wording import duration, first_line, one_line

Tell = Callable[[dict[str, Any]], None]
"""Takes what became known: fields of ``TeacherRow``, a ``reason``, the ``stage`` that begins."""

_SEED = 0
_LONGEST_REASON = 400


@dataclass(frozen=True)
class Task:
    """One teacher to measure.

    Args:
        source: entry of ``teachers``.
        model: of that source.
        settings: what the figures depend on.
        verifier: the card of the teacher that judges its dreams.
        plugins: modules or files that its process loads.
        network: how it is told of where it is no model of a source; a recipe's teacher, say.
    """

    source: str
    model: str
    settings: Settings
    verifier: Card | None = None
    plugins: tuple[str, ...] = ()
    network: NetworkName | None = None


def measure(task: Task, deadline: float, tell: Tell) -> None:
    """Measure a teacher, telling every figure as it is known, and of what fails the reason.

    Args:
        task: the teacher.
        deadline: by ``time.time()``; no dreaming is begun that would not end before.
        tell: takes what became known.
    """
    registries, settings = build_registries(task.plugins), task.settings
    tell({"stage": "loading it"})
    try:
        if task.network is None:
            loaded = load_teacher(registries, task.source, task.model, settings.weights)
        else:
            loaded, registries = load_network(task.network, _with(task.plugins))
        layers = batch_norm_layers(loaded.model)
        tell({"input_size": list(loaded.card.input_size), "bn_layers": len(layers)})
        tell({"params": sum(p.numel() for p in loaded.model.parameters())})
        teacher = admit(loaded)
        model, card = teacher.model, teacher.card
    except Exception as error:  # the model's own code may raise anything
        cut_short = "weights" if isinstance(error, WeightsUnavailable) else None
        tell({"reason": explain(error), "cut_short": cut_short})
        return
    device = torch.device(settings.device)
    with _explained(tell, "counting its FLOPs"):
        tell({"flops": count(model, card.input_size).flops})
    with _explained(tell, "timing its inference"):
        image = torch.zeros(1, *card.input_size)
        (timing,) = default_backend(registries, device).time([(model, image)])
        tell({"latency_ms": timing.median_ms})
    with _explained(tell, "inverting it"):
        if device.type == "cuda":
            torch.cuda.set_device(device)
        model.to(device)
        with inversion(settings).session(teacher, device) as dreamer:
            dreams = _invert(task, teacher, dreamer, deadline, tell)
        if dreams is not None and task.verifier is not None:
            tell({"stage": "having its dreams judged"})
            tell(_verified(registries, task.verifier, settings, dreams, teacher))


def verifier_name(text: str) -> NetworkName:
    """Return how a verifier is told of; a model of a source has its trained weights."""
    name = NetworkName("--verifier", text)
    return name if name.is_recipe else replace(name, weights="default")


def _with(plugins: Sequence[str]) -> Callable[[Sequence[str]], Registries]:
    """Return what builds registries with some plugins beside a recipe's."""
    return lambda more: build_registries((*plugins, *more))


def inversion(settings: Settings) -> DeepInversion:
    """Return the inversion that every teacher gets: the default one, at one resolution."""
    return DeepInversion(
        images=settings.batch_size,
        batch_size=settings.batch_size,
        stages=(Stage(settings.steps),),
        engine=Engine(compile=False),
    )


def _invert(
    task: Task, teacher: Teacher, dreamer: Dreamer, deadline: float, tell: Tell
) -> StoredImages | None:
    """Time an inversion and, where it has a meaning and there is time, dream a batch."""
    settings = task.settings
    cost = dreamer.prepare(dreamer.batch_size)
    tell(
        {
            "seconds_per_step": cost.seconds / settings.steps,
            "images_per_second": dreamer.batch_size / cost.seconds,
            "memory_bytes": cost.memory_bytes,
            "precision": dreamer.choices["precision"],
        }
    )
    if settings.weights == "null":
        return None
    left = deadline - time.time()
    if cost.seconds > left:
        reason = (
            f"dreaming {settings.steps} steps takes about {duration(cost.seconds)}, and "
            f"{duration(max(0.0, left))} of its time is left"
        )
        tell({"reason": reason, "cut_short": "time"})
        return None
    tell({"stage": f"dreaming {settings.steps} steps"})
    dream = dreamer.dream(
        BatchPlan(0, 0, dreamer.batch_size, batch_seed(_SEED, 0)), lambda step, terms: None
    )
    dreams, quality = as_stored(dream, teacher)
    distance = overall(quality.statistics_distance)
    if distance is not None and not math.isfinite(distance):
        raise DreamkitError("the feature statistics of its dreams are not finite")
    tell({"statistics_distance": distance})
    return dreams


@torch.no_grad()
def _verified(
    registries: Registries,
    card: Card,
    settings: Settings,
    dreams: StoredImages,
    teacher: Teacher,
) -> dict[str, Any]:
    """Return how often the verifier sees what was dreamed of, or the reason why it cannot tell."""
    assert settings.verifier is not None
    reason = None
    if card.weights_sha256 == teacher.card.weights_sha256:
        reason = "the verifier is this teacher"
    elif card.num_classes != teacher.card.num_classes:
        reason = f"the verifier has {card.num_classes} classes, not {teacher.card.num_classes}"
    elif card.input_size[0] != teacher.card.input_size[0]:
        reason = f"the verifier takes {card.input_size[0]} channels"
    if reason is not None:
        return {"reason": f"no cross-model accuracy: {reason}"}
    device = torch.device(settings.device)
    verifier, _ = load_network(verifier_name(settings.verifier), lambda plugins: registries)
    verifier = admit(verifier, judge=True)
    verifier.model.to(device)
    images = resized(dreams.images.to(device).float(), card.input_size[1:])
    with eval_mode(verifier.model):
        seen = verifier.model(card.normalise(images)).argmax(1).cpu()
    return {"cross_model_accuracy": float((seen == dreams.labels).float().mean())}


@contextlib.contextmanager
def _explained(tell: Tell, stage: str) -> Iterator[None]:
    """Tell that a stage begins and, where it fails, the reason: the next one may do."""
    tell({"stage": stage})
    try:
        yield
    except Exception as error:  # the model's own code may raise anything
        known = isinstance(error, DreamkitError)
        tell({"reason": explain(error) if known else f"{stage}: {explain(error)}"})


def explain(error: Exception) -> str:
    """Return an error as a reason, in one line."""
    # What follows the first sentence, or line, is advice to the writer of a recipe.
    if isinstance(error, TeacherMismatch):
        text = error.message.partition(". ")[0]
    elif isinstance(error, WeightsUnavailable):
        text = first_line(error.message)
    elif isinstance(error, DreamkitError):
        text = error.message
    elif is_out_of_memory(error):
        text = f"out of memory ({error})"
    else:
        text = f"{type(error).__name__}: {error}"
    return one_line(text, _LONGEST_REASON).removesuffix(".")
