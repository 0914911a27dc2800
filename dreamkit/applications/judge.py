"""Judging dreams by networks that took no part in them.

DeepInversion (Yin et al., CVPR 2020), Tables 2 and 3. The inverted network sees in its dreams what
it was asked to; whether others do tells if the dreams show the classes or only its weaknesses.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from dreamkit.card import Card
from dreamkit.errors import DreamkitError, OptionError, placed
from dreamkit.evaluation.features import find_layer
from dreamkit.evaluation.fidelity import check_fidelity, fidelity_scores
from dreamkit.evaluation.judgement import Judgement, judge_by
from dreamkit.registry import EntriesOf, EntryOf
from dreamkit.stages.dreaming import images_of
from dreamkit.stages.measuring import measure_quality
from dreamkit.stages.opening import dreamed_from, opened
from dreamkit.store.source import is_own_dreams
from dreamkit.teachers.intake import admit
from dreamkit.teachers.weights import hash_weights
from dreamkit.types import (
    Application,
    Images,
    ImageSource,
    Outcome,
    RunContext,
    Synthesis,
    Teacher,
    TeacherSource,
)


@dataclass(frozen=True)
class Judge(Application):
    """Ask other networks what they see in dreams (or other images) of a teacher.

    DeepInversion, Tables 2 and 3. Of each verifier: its accuracy on the classes that the images are
    to show, its classifier score (the formula of the Inception score), and, given real images, the
    Fréchet distance to them at a layer. Neither compares with published IS and FID; ``fidelity``
    does. Images are resized whole to a verifier's input (bilinear, antialiased) and normalised by
    its own card.

    Args:
        images: what is judged; this run's own dreams by default.
        verifiers: networks with the teacher's classes in its order; never the teacher itself.
        reference: real images, for the Fréchet distance and FID. Like the dreams they come at
            the teacher's size before they are resized.
        splits: parts that the classifier score and the Inception score are averaged over.
        layer: the module whose input, averaged over positions, is compared with the reference's;
            every verifier must have it. Null is each one's last linear layer.
        fidelity: the Inception score, and with a reference FID, by the library torch-fidelity,
            which downloads Inception's weights.
    """

    images: Annotated[ImageSource | None, EntryOf("sources")] = None
    verifiers: Annotated[tuple[TeacherSource, ...], EntriesOf("teachers")] = ()
    reference: Annotated[ImageSource | None, EntryOf("sources")] = None
    splits: Annotated[int, Field(ge=1)] = 10
    layer: str | None = None
    fidelity: bool = False

    def __post_init__(self) -> None:
        if not self.verifiers and not self.fidelity:
            raise OptionError("verifiers", "give at least one verifier, or 'fidelity: true'")
        if self.layer is not None and self.reference is None:
            raise OptionError("layer", "it is for the Fréchet distance, which needs 'reference'")

    @property
    def needs_synthesis(self) -> bool:
        """Whether the run dreams its images itself."""
        return is_own_dreams(self.images)

    def run(
        self, teacher: Teacher, images: Images | Synthesis | None, context: RunContext
    ) -> Outcome:
        """Load every verifier, dream, and judge."""
        self._check(teacher, images)
        reference = self._open_reference(teacher.card, context)
        numbers = range(len(self.verifiers))
        verifiers = [self._load(number, teacher, context) for number in numbers]
        layers = [self._layer(verifier) for verifier in verifiers]
        judged = images_of(teacher, images, context)
        measure_quality("teacher", teacher.model, teacher, None, context)
        context.log.metrics["judge.images"] = len(judged)
        context.log.details["judge"] = {
            "images": len(judged),
            "splits": self.splits,
            "reference_images": None if reference is None else len(reference),
            "verifiers": self._judge(judged, reference, verifiers, layers, context),
        }
        if self.fidelity:
            self._score_fidelity(judged, reference, context)
        return Outcome(images=judged)

    def _check(self, teacher: Teacher, images: Images | Synthesis | None) -> None:
        """Refuse what would fail only after the dreaming."""
        if isinstance(images, Synthesis) and images.synthesizer.images < self.splits:
            raise DreamkitError(
                f"{images.synthesizer.images} images cannot make {self.splits} splits", ("splits",)
            )
        if self.fidelity:
            with placed("fidelity"):
                check_fidelity(teacher.card.input_size[0])

    def _open_reference(self, card: Card, context: RunContext) -> Images | None:
        if self.reference is None:
            return None
        with placed("reference"):
            images = opened(self.reference, card, context.log.note)
            if len(images) < 2:
                raise DreamkitError("a covariance needs at least two reference images")
        return images

    def _load(self, index: int, teacher: Teacher, context: RunContext) -> Teacher:
        with placed("verifiers", index), context.log.progress("loading a verifier", 1):
            verifier = admit(self.verifiers[index].load(context.seed), context.log.note, judge=True)
            check_verifier(verifier, teacher, dreamed_from(self.images))
        if not verifier.card.trained:
            context.log.note(
                f"the weights of the verifier {verifier.card.name} are random: what it says means "
                "nothing"
            )
        return verifier

    def _layer(self, verifier: Teacher) -> str | None:
        if self.reference is None:
            return None
        return find_layer(verifier.model, verifier.card, self.layer)[0]

    def _judge(
        self,
        images: Images,
        reference: Images | None,
        verifiers: Sequence[Teacher],
        layers: Sequence[str | None],
        context: RunContext,
    ) -> list[dict[str, Any]]:
        """Ask the verifiers one after the other, and return what the report says of each."""
        rows: list[dict[str, Any]] = []
        names = metric_names([verifier.card.name for verifier in verifiers])
        each = len(images) + (0 if reference is None else len(reference))
        splits, seed, device = self.splits, context.seed, context.device
        with context.log.progress("judging", each * len(verifiers)) as advance:
            for name, verifier, layer in zip(names, verifiers, layers, strict=True):

                def done(count: int, before: int = each * len(rows)) -> None:
                    advance(before + count)

                found = judge_by(verifier, images, reference, layer, splits, seed, device, done)
                verifier.model.cpu()  # one at a time on the device
                for key, value in found.metrics().items():
                    context.log.metrics[f"judge.{name}.{key}"] = value
                rows.append(_describe(name, verifier.card, layer, found))
                if found.biased:
                    context.log.note(
                        f"{verifier.card.name} has {found.features} features at {layer}, for which "
                        f"{len(images)} images and {len(reference or ())} real ones are few: the "
                        "Fréchet distance is biased upwards"
                    )
        if verifiers and found.accuracy is None:
            context.log.note("the images have no labels: no verifier's accuracy is measured")
        return rows

    def _score_fidelity(
        self, images: Images, reference: Images | None, context: RunContext
    ) -> None:
        with context.log.progress("fidelity", 1) as advance:
            found = fidelity_scores(images, reference, self.splits, context.device, context.seed)
            advance(1)
        metrics = context.log.metrics
        metrics["judge.inception_score"] = found.inception_score
        metrics["judge.inception_score_std"] = found.inception_score_std
        if found.fid is not None:
            metrics["judge.fid"] = found.fid


def _describe(name: str, card: Card, layer: str | None, found: Judgement) -> dict[str, Any]:
    return {
        "name": name,
        "card": card.name,
        "origin": card.origin,
        "weights_sha256": card.weights_sha256,
        "layer": layer,
        "features": found.features,
    }


def check_verifier(verifier: Teacher, teacher: Teacher, inverted: Collection[str] = ()) -> None:
    """Refuse a network that cannot judge a teacher's dreams.

    Args:
        verifier: the network.
        teacher: the teacher.
        inverted: hashes of the weights that dreams of earlier runs came from.

    Raises:
        DreamkitError: it is the inverted network itself, or takes other channels or knows other
            classes than the teacher.
    """
    ours, theirs = verifier.card, teacher.card
    if _weights_of(verifier) in {_weights_of(teacher), *inverted}:
        raise DreamkitError(
            f"{ours.name} is the inverted teacher itself, which sees in its dreams whatever it was "
            "asked to: choose a network of other weights"
        )
    if ours.input_size[0] != theirs.input_size[0]:
        raise DreamkitError(
            f"the verifier {ours.name} takes {ours.input_size[0]} channels, the images of "
            f"{theirs.name} have {theirs.input_size[0]}"
        )
    if ours.num_classes != theirs.num_classes:
        raise DreamkitError(
            f"the verifier {ours.name} has {ours.num_classes} classes, the teacher {theirs.name} "
            f"has {theirs.num_classes}"
        )
    pairs = zip(ours.class_names or (), theirs.class_names or (), strict=False)
    for number, (our, their) in enumerate(pairs):
        if our != their:
            raise DreamkitError(
                f"class {number} of the verifier {ours.name} is '{our}', of the teacher "
                f"{theirs.name} '{their}'; if that is the same, leave out the class names of one"
            )


def _weights_of(network: Teacher) -> str:
    return network.card.weights_sha256 or hash_weights(network.model)


def metric_names(names: Sequence[str]) -> list[str]:
    """Return names that can stand between the dots of a metric, each once.

    Whatever is no letter, digit, ``_``, ``-`` or ``/`` becomes ``_``; the second network of one
    name gets ``_2``.
    """
    given: list[str] = []
    for name in names:
        plain = re.sub(r"[^\w/-]+", "_", name)
        numbers = itertools.count(2)
        unique = plain
        while unique in given:
            unique = f"{plain}_{next(numbers)}"
        given.append(unique)
    return given
