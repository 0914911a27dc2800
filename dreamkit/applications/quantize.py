"""INT8 without real images: ranges are taken on dreams, and what comes of it is measured.

Dreams stand in for the calibration images that quantisation asks for (DeepInversion: Yin et al.,
CVPR 2020; bias correction: Nagel et al., ICCV 2019).
"""

from __future__ import annotations

import dataclasses
import fnmatch
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dreamkit.errors import DreamkitError, OptionError, did_you_mean, placed
from dreamkit.quantizers.onnx_runtime import OnnxQuantizer
from dreamkit.registry import EntryOf
from dreamkit.resizing import for_card
from dreamkit.stages.dreaming import images_of
from dreamkit.stages.keeping_float import kept_for_effect
from dreamkit.stages.opening import check_dreamed, opened
from dreamkit.stages.quantization_aware import QuantizationAwareTraining, trained_in_integers
from dreamkit.stages.quantized_file import Finished, keep_file, measure_file, time_file
from dreamkit.stages.quantizing import (
    NOISE,
    Workbench,
    calibrated,
    calibration_parts,
    hash_images,
    neighbour_correlation,
    training_parts,
)
from dreamkit.stages.samples import LEAST, Parts
from dreamkit.store.source import is_own_dreams
from dreamkit.training.batches import Subset
from dreamkit.types import (
    Application,
    Images,
    ImageSource,
    Outcome,
    Quantizer,
    RunContext,
    Synthesis,
    Teacher,
)
from dreamkit.wording import and_more


@dataclass(frozen=True)
class Quantize(Application):
    """Write the network in 8-bit integers, calibrated on dreams, and hold it against float.

    The file and what is known of it lie in ``quantized/``. It is run before it is kept. Agreement
    with float is measured on images that the calibration did not see, and accuracy on evaluation
    images.

    Args:
        quantizer: how it is written, and for what.
        after: an application that makes a student of the teacher first, such as ``prune``; then
            the student is written, calibrated on the images that it was made on. None writes the
            teacher.
        images: what it is calibrated on; this run's own dreams by default.
        calibration_images: of them, at the most; a half at the most, so that there are others to
            compare on.
        compare: further images that agreement is measured on, such as dreams of another seed and
            setting.
        keep_float: layers that stay in float, by name, ``*`` for any part of one; or ``auto``:
            those that change the outputs most, as measured, within ``float_budget``.
        float_budget: how much longer a pass may take for ``keep_float: auto``, a share.
        training: train in integers on the images, taught by float, with the integers simulated
            (LSQ: Esser et al., ICLR 2020); null does not. A quarter of the images is kept for
            comparing.
        max_disagreement: share of unseen images that float and the file may put into other
            classes; if it is more, the file is kept and the run fails.
        latency_batches: images in a pass that is timed, each on one thread and on all; none times
            nothing.
    """

    quantizer: Annotated[Quantizer, EntryOf("quantizers")] = field(default_factory=OnnxQuantizer)
    after: Annotated[Application | None, EntryOf("applications")] = None
    images: Annotated[ImageSource | None, EntryOf("sources")] = None
    calibration_images: Annotated[int, Field(ge=1)] = 64
    compare: Annotated[ImageSource | None, EntryOf("sources")] = None
    keep_float: Literal["auto"] | tuple[str, ...] = ()
    float_budget: Annotated[float, Field(ge=0)] = 0.1
    training: QuantizationAwareTraining | None = None
    max_disagreement: Annotated[float, Field(ge=0, le=1)] = 0.1
    latency_batches: tuple[Annotated[int, Field(ge=1)], ...] = (1, 32)

    def __post_init__(self) -> None:
        if self.after is not None and self.images is not None:
            raise OptionError(
                "images",
                "leave it out: after another application the images are those that its student "
                "was made on",
            )
        if self.training is not None and not self.quantizer.calibrates:
            raise OptionError(
                "training",
                "set it to null: the quantizer takes ranges as images pass, and there is nothing "
                "to train in them; {name: onnxruntime} has",
            )

    @property
    def needs_synthesis(self) -> bool:
        """Whether the run dreams its images itself."""
        return is_own_dreams(self.images) if self.after is None else self.after.needs_synthesis

    @property
    def trains_student(self) -> bool:
        """Whether the application before dreams against its student."""
        return self.after is not None and self.after.trains_student

    def make_student(self, teacher: Teacher, context: RunContext) -> Teacher:
        """Return the student that the application before starts from."""
        if self.after is None:
            return super().make_student(teacher, context)
        return self.after.make_student(teacher, context)

    def planned(
        self, teacher: Teacher, synthesis: Synthesis, context: RunContext
    ) -> tuple[Synthesis, RunContext]:
        """Return what dreaming will come to, as the application before has it."""
        if self.after is None:
            return super().planned(teacher, synthesis, context)
        return self.after.planned(teacher, synthesis, context)

    def run(
        self, teacher: Teacher, images: Images | Synthesis | None, context: RunContext
    ) -> Outcome:
        """Dream, make the student if there is to be one, calibrate, train, write, measure."""
        note = context.log.note
        further = None
        if self.compare is not None:
            with placed("compare"):
                check_dreamed(self.compare, teacher.card)
                further = opened(self.compare, teacher.card, note)
        if (text := self.quantizer.note()) is not None:
            note(text)
        if self.after is None:
            outcome = Outcome(images=images_of(teacher, images, context))
        else:
            with placed("after", always=False):
                outcome = _made_by(self.after, teacher, images, context)
        whole, network = outcome.images, outcome.student or teacher
        if context.evaluation is not None:
            seen = for_card(context.evaluation, teacher.card, network.card)
            context = dataclasses.replace(context, evaluation=seen)
        if further is not None:
            further = for_card(further, teacher.card, network.card)
        assert whole is not None  # both ways saw to it
        if self.training is None:
            parts = calibration_parts(whole, self.calibration_images, context.seed)
        else:
            parts = training_parts(whole, context.seed)
        some = Subset(parts.fitted, list(range(min(len(parts.fitted), self.calibration_images))))
        calibration = self._describe(some, parts, context)
        with tempfile.TemporaryDirectory(prefix="dreamkit-") as scratch:
            bench = calibrated(network, self.quantizer, some, Path(scratch), context)
            kept = self._kept(bench)
            if self.training is None:
                path = bench.write(kept)
            else:
                bench = trained_in_integers(bench, kept, parts.fitted, self.training)
                path = bench.write(())
            name = "teacher" if outcome.student is None else "student"
            finished = measure_file(bench, name, path, kept, parts, further)
            time_file(bench, path, self.latency_batches)
            keep_file(bench, finished, calibration)
        self._judge(finished, parts, context)
        return outcome

    def _describe(self, some: Images, parts: Parts, context: RunContext) -> dict[str, Any]:
        """Return what the JSON says of the calibration images, and note what is wrong with them."""
        if not self.quantizer.calibrates:
            context.log.note(
                f"nothing is calibrated; compared with float on {len(parts.compared)} images"
            )
            return {"images": 0}
        correlation = neighbour_correlation(some)
        if correlation < NOISE:
            context.log.note(
                f"the calibration images look like noise (neighbouring pixels correlate by "
                f"{correlation:.2f}): ranges of noise are not those of pictures, and accuracy "
                "suffers more than agreement on noise tells. Calibrate on dreams, or on images"
            )
        if parts.apart:
            trained = f", trained on {len(parts.fitted)}" if self.training is not None else ""
            context.log.note(
                f"calibrated on {len(some)} images{trained}, and compared with float on "
                f"{len(parts.compared)} others"
            )
        else:
            done, share = (
                ("calibrated", "a half") if self.training is None else ("trained", "a quarter")
            )
            least = 2 * LEAST if self.training is None else 4 * LEAST
            context.log.note(
                f"of {len(parts.fitted)} images none are left to compare on: agreement with float "
                f"is measured on what was {done} on. Of {least} and more {share} is left"
            )
        return {
            "images": len(some),
            "sha256": hash_images(some),
            "neighbour_correlation": correlation,
        }

    def _kept(self, bench: Workbench) -> tuple[str, ...]:
        """Return the layers that stay in float.

        Raises:
            DreamkitError: a name matches none, or the quantizer has no layers to choose from.
        """
        known = bench.quantization.layers
        with placed("keep_float"):
            if self.keep_float and not known:
                raise DreamkitError("this quantizer cannot leave layers in float: leave it out")
            if self.keep_float == "auto":
                return kept_for_effect(bench, bench.calibration, self.float_budget)
            for pattern in self.keep_float:
                if not fnmatch.filter(known, pattern):
                    raise DreamkitError(
                        f"no layer '{pattern}'{did_you_mean(pattern, known)} (layers: "
                        f"{and_more(known)})"
                    )
        return tuple(
            name for name in known if any(fnmatch.fnmatchcase(name, p) for p in self.keep_float)
        )

    def _judge(self, finished: Finished, parts: Parts, context: RunContext) -> None:
        """Say so if the file disagrees with float too often."""
        differ = 1 - finished.agreement
        if differ > self.max_disagreement:
            which = "images that calibration did not see" if parts.apart else "calibration images"
            context.log.failures.append(
                f"the file in integers and float put {differ:.1%} of {len(parts.compared)} {which} "
                f"into different classes, more than max_disagreement {self.max_disagreement:.1%}. "
                f"The layers of most noise: {finished.worst or 'not known'}; see keep_float"
            )


def _made_by(
    application: Application,
    teacher: Teacher,
    images: Images | Synthesis | None,
    context: RunContext,
) -> Outcome:
    """Run an application, and return its student and the images that it was made on.

    Raises:
        DreamkitError: it makes no student, or tells of no images.
    """
    if images is None and not application.needs_synthesis:
        option = application.images_option
        source = getattr(application, option, None)
        if source is not None:
            with placed(option):
                check_dreamed(source, teacher.card)
                images = opened(source, teacher.card, context.log.note)
    outcome = application.run(teacher, images, context)
    if outcome.student is None or outcome.images is None:
        raise DreamkitError(
            "this application makes no student, or keeps no images: name one that does, such as "
            "prune, recover or distill"
        )
    return outcome
