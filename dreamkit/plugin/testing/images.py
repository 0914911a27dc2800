"""Checks of what images and networks come from: synthesizers, sources, teachers."""

from __future__ import annotations

import torch
from torch import Tensor

from dreamkit.card import Card
from dreamkit.plugin.testing.tiny import (
    SIZE,
    check_gradient,
    expect,
    made,
    tiny_teacher,
    untouched,
    working,
)
from dreamkit.types import (
    NO_LABEL,
    BatchPlan,
    Dream,
    ImageSource,
    Parameterisation,
    Synthesizer,
    Teacher,
    TeacherSource,
    Watchable,
)

_CPU = torch.device("cpu")


def check_synthesizer(entry: Synthesizer | type) -> None:
    """Check a synthesizer: normalised images that the plan's seed alone decides.

    It dreams two small batches of 3×8×8 images of 4 classes, so give it few steps. The teacher is
    left as it was. One that is ``Watchable`` is watched while it dreams the second.

    Raises:
        ContractError: it is not.
    """
    synthesizer, name = made("synthesizers", entry)
    for option in ("images", "steps_per_batch"):
        value = getattr(synthesizer, option)
        expect(
            type(value) is int and value > 0,
            f"{name}.{option} should be an integer above 0 (got {value!r})",
        )
    teacher = tiny_teacher()
    with untouched(teacher.model, name), working(f"{name} on a network with BatchNorm"):
        synthesizer.check(teacher)
        first, again = (_dreamed(synthesizer, teacher, name, watched) for watched in (False, True))
    expect(
        torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels),
        f"{name} dreams other images of the same plan: draw all that is random from plan.seed, "
        "and change nothing where it is watched",
    )


def _dreamed(synthesizer: Synthesizer, teacher: Teacher, name: str, watched: bool) -> Dream:
    steps: list[int] = []
    seen: list[tuple[Tensor, Tensor]] = []
    with synthesizer.session(teacher, _CPU, seed=3) as dreamer:
        estimate = dreamer.prepare(synthesizer.images)
        expect(estimate.seconds >= 0, f"{name} expects to take {estimate.seconds} s")
        size = min(2, dreamer.batch_size)
        for key, value in dreamer.state().items():
            expect(isinstance(value, Tensor), f"{name}: the state '{key}' is no Tensor")
        dreamer.restore(dreamer.state())
        shows = watched and isinstance(dreamer, Watchable)
        if watched and isinstance(dreamer, Watchable):
            dreamer.watch(lambda images, labels: seen.append((images, labels)))
        dream = dreamer.dream(BatchPlan(0, 0, size, 5), lambda step, terms: steps.append(step))
    shape = tuple(dream.images.shape)
    expect(shape == (size, *SIZE), f"{name} dreamed {shape}, asked for {(size, *SIZE)}")
    expect(
        len(seen) == (len(steps) if shows else 0),
        f"{name} showed images in {len(seen)} of {len(steps)} steps",
    )
    for images, labels in seen:
        expect(
            images.dim() == 4 and images.shape[:2] == dream.images.shape[:2],
            f"{name} showed images of shape {tuple(images.shape)}, asked for {(size, *SIZE)}",
        )
        expect(not images.requires_grad, f"{name} showed images that carry gradients: detach them")
        _check_labels(labels, size, teacher.card.num_classes, name)
    expect(dream.images.is_floating_point(), f"{name} dreamed {dream.images.dtype}, not floats")
    expect(bool(dream.images.isfinite().all()), f"{name} dreamed values that are not finite")
    _check_labels(dream.labels, size, teacher.card.num_classes, name)
    expect(dream.loss == dream.loss, f"{name} gives no number for its loss")
    expect(
        len(steps) == synthesizer.steps_per_batch,
        f"{name} called on_step {len(steps)} times, and steps_per_batch is "
        f"{synthesizer.steps_per_batch}",
    )
    return dream


def check_parameterisation(entry: Parameterisation | type) -> None:
    """Check a parameterisation: ``render`` undoes ``encode``, and gradients flow through it.

    Raises:
        ContractError: it is not.
    """
    parameterisation, name = made("parameterisations", entry)
    draws = torch.Generator().manual_seed(0)
    images = torch.randn(2, *SIZE, generator=draws)
    with working(f"{name} on images of {SIZE}"):
        start = parameterisation.start((2, *SIZE), torch.Generator().manual_seed(0))
        encoded = parameterisation.encode(images)
        rendered = parameterisation.render(encoded, SIZE[1:])
    expect(start.shape == encoded.shape, f"{name}.start and encode return other shapes")
    expect(
        rendered.shape == images.shape and torch.allclose(rendered, images, atol=1e-3),
        f"{name}: what render makes of encode's parameters is not the images",
    )
    expect(encoded.data_ptr() != images.data_ptr(), f"{name}.encode returns the images' own memory")
    moved = start.clone().requires_grad_()
    with working(f"{name}.render"):
        value = parameterisation.render(moved, SIZE[1:]).square().mean()
    check_gradient(value, moved, f"{name}.render", "the parameters")


def check_source(entry: ImageSource | type, card: Card | None = None) -> None:
    """Check a source: stored images of a card's size, with labels in its classes or none.

    Args:
        entry: the source.
        card: what images are for; that of ``tiny_teacher`` by default, 3×8×8 and 4 classes.

    Raises:
        ContractError: it is not.
    """
    source, name = made("sources", entry)
    card = tiny_teacher().card if card is None else card
    with working(f"{name}.open"):
        names = source.class_names()
        images = source.open(card)
        count = len(images)
        expect(count > 0, f"{name} has no images")
        chosen = sorted({0, count - 1})
        stored, labels = images.batch(chosen)
    expect(
        names is None or (isinstance(names, tuple) and all(isinstance(n, str) for n in names)),
        f"{name}.class_names should return a tuple of names or None (got {names!r})",
    )
    expect(stored.dtype == torch.uint8, f"{name} returned {stored.dtype}; stored images are uint8")
    shape, wanted = tuple(stored.shape), (len(chosen), *card.input_size)
    expect(shape == wanted, f"{name} returned images of shape {shape}, the card asks for {wanted}")
    _check_labels(labels, len(chosen), card.num_classes, name, unlabelled=True)


def check_teacher(entry: TeacherSource | type) -> None:
    """Check a source of teachers: a network in eval mode that is as its card says.

    Raises:
        ContractError: it is not.
    """
    source, name = made("teachers", entry)
    with working(f"{name}.load and build"):
        teacher, again, built = source.load(0), source.load(0), source.build()
    card, model = teacher.card, teacher.model
    expect(not model.training, f"{name}.load returned a model in training mode: call eval()")
    state = model.state_dict()
    expect(
        {k: v.shape for k, v in state.items()}
        == {k: v.shape for k, v in built.state_dict().items()},
        f"{name}.build returned another architecture than load",
    )
    expect(
        all(torch.equal(v, again.model.state_dict()[k]) for k, v in state.items()),
        f"{name}.load returned other weights for the same seed",
    )
    with torch.no_grad(), working(f"{name}: its model on an image of {card.input_size}"):
        shape = tuple(model(torch.zeros(2, *card.input_size)).shape)
    wanted = (2, card.num_classes)
    expect(shape == wanted, f"{name}: its model returned {shape}, its card says {wanted}")


def _check_labels(
    labels: Tensor, count: int, classes: int, name: str, unlabelled: bool = False
) -> None:
    expect(labels.dtype == torch.int64, f"{name} returned labels of {labels.dtype}, not int64")
    shape = tuple(labels.shape)
    expect(shape == (count,), f"{name} returned labels of shape {shape} for {count} images")
    known = (labels >= 0) & (labels < classes)
    if unlabelled:
        known |= labels == NO_LABEL
    expect(bool(known.all()), f"{name} returned labels out of range: {labels.tolist()}")
