"""Several synthesizers in one run, each with its share of the images, batch by batch in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from dreamkit.copying import copied
from dreamkit.errors import DreamkitError, NonFiniteLoss, OptionError, TeacherMismatch, placed
from dreamkit.flat_state import below, prefixed
from dreamkit.registry import EntriesOf
from dreamkit.seeds import derived_seed
from dreamkit.types import (
    BatchPlan,
    Dream,
    Dreamer,
    Estimate,
    OnImages,
    OnStep,
    Synthesizer,
    Teacher,
    Watchable,
    with_images,
)
from dreamkit.wording import duration


class Mixed(Synthesizer):
    """Several synthesizers in one run, each with its share of the images.

    Each batch is made by one of them, whose turn it is: by the one that is furthest behind its
    share. So a student in training is given dreams of all kinds from the beginning. In a recipe a
    list stands for it, whose entries may have a ``share``::

        synthesis:
          - {name: deepinversion, images: 3072}
          - {name: cmi, images: 1024, regularizers: {bn_feature: 1}}

    Args:
        of: the synthesizers.
        shares: of all images, one number for each, relative to one another; null has each make its
            own ``images``.
        images: how many to dream in all; null is what the synthesizers' own ``images`` come to.
    """

    def __init__(
        self,
        of: Annotated[tuple[Synthesizer, ...], EntriesOf("synthesizers")],
        shares: tuple[Annotated[float, Field(gt=0)], ...] | None = None,
        images: Annotated[int, Field(ge=1)] | None = None,
    ) -> None:
        if not of:
            raise OptionError("of", "give at least one synthesizer")
        if any(isinstance(member, Mixed) for member in of):
            raise OptionError("of", "'mixed' is none of its own: put all of them in one list")
        if shares is not None and len(shares) != len(of):
            raise OptionError("shares", f"{len(shares)} for {len(of)} synthesizers: give each one")
        self.of = of
        self.shares = [member.images for member in of] if shares is None else [*shares]
        self.images = sum(member.images for member in of) if images is None else images

    @property
    def steps_per_batch(self) -> int:
        """The most that one of them takes; another's steps count for several."""
        return max(member.steps_per_batch for member in self.of)

    @property
    def needs_student(self) -> str | None:
        """The first term that competes with a student, and whose it is."""
        for place, member in enumerate(self.of):
            if (term := member.needs_student) is not None:
                return f"{term} (of[{place}])"
        return None

    @property
    def members(self) -> Sequence[Synthesizer]:
        """Those that have an image or more to make, each with its number of images."""
        return [member for _, member in self.placed_members]

    @property
    def placed_members(self) -> list[tuple[int, Synthesizer]]:
        """The same, each with its place in ``of``."""
        parts = enumerate(zip(self.of, apportioned(self.images, self.shares), strict=True))
        return [(place, with_images(member, part)) for place, (member, part) in parts if part]

    def image_size(self, teacher: Teacher) -> tuple[int, int]:
        """Return what they have in common."""
        return self.of[0].image_size(teacher)

    def check(self, teacher: Teacher) -> None:
        """Refuse a teacher that one of them does not fit, and images of different sizes."""
        for place, member in enumerate(self.of):
            with placed("of", place):
                member.check(teacher)
                own, size = member.image_size(teacher), self.image_size(teacher)
                if own != size:
                    raise TeacherMismatch(
                        f"its images are {own[0]}x{own[1]} and those of 'of[0]' "
                        f"{size[0]}x{size[1]}: let the last stage of each have the same size"
                    )

    @contextmanager
    def session(
        self,
        teacher: Teacher,
        device: torch.device,
        choices: Mapping[str, Any] | None = None,
        note: Callable[[str], None] = lambda text: None,
        student: nn.Module | None = None,
        seed: int = 0,
    ) -> Iterator[Turns]:
        """Bind all of them to a teacher; on leaving it is as it was."""
        made = (choices or {}).get("of", [])
        with ExitStack() as stack:
            # Hooks of two in one network would meet: all but the first have a copy of their own.
            models = [teacher.model, *(copied(teacher.model) for _ in self.members[1:])]
            members = []
            for number, (place, member) in enumerate(self.placed_members):
                own = replace(teacher, model=models[number])
                say = partial(_say, note, f"of[{place}]: ")
                chosen = made[number] if number < len(made) else None
                drawn = derived_seed(seed, f"synthesizer {place}")
                with placed("of", place):
                    begun = member.session(own, device, chosen, say, student, seed=drawn)
                    members.append(Member(place, member, stack.enter_context(begun), say))
            yield Turns(self, members, self.image_size(teacher))


@dataclass(frozen=True)
class Member:
    """One of several synthesizers at work.

    Args:
        place: among them.
        synthesizer: with its number of images.
        dreamer: the same, bound to a teacher.
        note: tells the user something of it.
    """

    place: int
    synthesizer: Synthesizer
    dreamer: Dreamer
    note: Callable[[str], None]


class Turns:
    """Several synthesizers bound to a teacher, each of which makes the batches of its turns.

    Args:
        options: the recipe's.
        members: those that have images to make.
        size: height and width of all images.
    """

    def __init__(self, options: Mixed, members: Sequence[Member], size: tuple[int, int]) -> None:
        self.options = options
        self.members = members
        self.size = size
        parts = [member.synthesizer.images for member in members]
        self._turns = turns(parts, [member.dreamer.batch_size for member in members])

    @property
    def dreamers(self) -> Sequence[Dreamer]:
        """Those who make the batches."""
        return [member.dreamer for member in self.members]

    @property
    def batch_sizes(self) -> Sequence[int]:
        """Images of every batch of the run, in order."""
        return [plan.size for _, plan in self._turns]

    @property
    def batch_size(self) -> int:
        """How many images one of them makes together at the most."""
        return max(dreamer.batch_size for dreamer in self.dreamers)

    @property
    def choices(self) -> dict[str, Any]:
        """What each resolved."""
        return {"of": [dict(dreamer.choices) for dreamer in self.dreamers]}

    def prepare(self, images: int) -> Estimate:
        """Time a few steps of each; what is to come is taken to be mixed as all is."""
        seconds, memory = 0.0, 0
        for member in self.members:
            own = math.ceil(images * member.synthesizer.images / self.options.images)
            cost = member.dreamer.prepare(own)
            size = member.dreamer.batch_size
            member.note(f"{own} images, {size} together: about {duration(cost.seconds)}")
            seconds, memory = seconds + cost.seconds, max(memory, cost.memory_bytes)
        return Estimate(seconds, memory)

    def dream(self, plan: BatchPlan, on_step: OnStep) -> Dream:
        """Have the one whose turn it is make a batch.

        Raises:
            NonFiniteLoss: its loss overflowed.
            DreamkitError: its images are not of the others' size.
        """
        number, own = self._turns[plan.index]
        member = self.members[number]
        steps, most = member.synthesizer.steps_per_batch, self.options.steps_per_batch

        def counted(done: int, terms: Mapping[str, Tensor]) -> None:
            on_step(done * most // steps, terms)

        try:
            dream = member.dreamer.dream(replace(own, size=plan.size, seed=plan.seed), counted)
        except NonFiniteLoss as error:
            raise NonFiniteLoss(f"of[{member.place}]: {error.message}") from error
        size = tuple(dream.images.shape[2:])
        if size != self.size:
            raise DreamkitError(
                f"its images are {size}, and {self.size} was said", ("of", member.place)
            )
        return dream

    def watch(self, on_images: OnImages) -> None:
        """Call back after each step of those that can be watched."""
        for dreamer in self.dreamers:
            if isinstance(dreamer, Watchable):
                dreamer.watch(on_images)

    def state(self) -> dict[str, Tensor]:
        """Return what each carries on."""
        state: dict[str, Tensor] = {}
        for member in self.members:
            state |= prefixed(str(member.place), member.dreamer.state())
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state that ``state`` returned."""
        for member in self.members:
            member.dreamer.restore(below(str(member.place), state))


def _say(note: Callable[[str], None], whose: str, text: str) -> None:
    note(whose + text)


def apportioned(images: int, shares: Sequence[float]) -> list[int]:
    """Divide images by shares, those left over to the largest remainders, the first of equals.

    Args:
        images: how many in all.
        shares: > 0, relative to one another.
    """
    relative = [share / max(shares) for share in shares]  # their sum is a number then
    exact = [images * share / sum(relative) for share in relative]
    parts = [math.floor(part) for part in exact]
    places = sorted(range(len(parts)), key=lambda place: parts[place] - exact[place])
    for place in places[: images - sum(parts)]:
        parts[place] += 1
    return parts


def turns(parts: Sequence[int], batch_sizes: Sequence[int]) -> list[tuple[int, BatchPlan]]:
    """Return whose turn each batch is, and which of its own batches that is; seeds are 0.

    It is the turn of whoever has the smallest part of its images, the first of equals.

    Args:
        parts: how many images each makes, > 0.
        batch_sizes: how many each makes together.
    """
    done, batches = [0] * len(parts), [0] * len(parts)
    found = []
    while any(made < part for made, part in zip(done, parts, strict=True)):
        who = min(range(len(parts)), key=lambda number: done[number] / parts[number])
        size = min(batch_sizes[who], parts[who] - done[who])
        found.append((who, BatchPlan(batches[who], done[who], size, 0)))
        done[who], batches[who] = done[who] + size, batches[who] + 1
    return found
