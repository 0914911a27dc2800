"""DAFL: a generator trained against the fixed teacher alone.

Chen et al., "Data-Free Learning of Student Networks", ICCV 2019. With the terms ``one_hot``
(weight 1), ``information_entropy`` (5) and ``activation`` (0.1) it is the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from dreamkit.flat_state import below, optimizer_state, prefixed, restore_optimizer
from dreamkit.seeds import derived_seed
from dreamkit.synthesizers.dreamer import Best, Session
from dreamkit.synthesizers.engine import Evaluator
from dreamkit.synthesizers.generative import Generative, GenerativeDreamer
from dreamkit.types import BatchPlan, Dream, OnStep


class DAFLDreamer(GenerativeDreamer):
    """DAFL bound to a teacher; it carries its generator from batch to batch."""

    def __init__(self, options: DAFL, session: Session) -> None:
        super().__init__(options, session)
        self.generator = self.new_generator(derived_seed(session.seed, "generator"))
        self.optimizer = torch.optim.Adam(self.generator.parameters(), lr=options.lr)

    def state(self) -> dict[str, Tensor]:
        """Return the generator, and its optimizer's momenta."""
        state = prefixed("generator", self.generator.state_dict())
        return state | prefixed("optimizer", optimizer_state(self.optimizer))

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state that ``state`` returned."""
        self.generator.load_state_dict(below("generator", state))
        restore_optimizer(self.optimizer, below("optimizer", state))

    def take_steps(
        self, plan: BatchPlan, steps: int, evaluator: Evaluator, on_step: OnStep
    ) -> Dream:
        """Train the generator for some steps, and return what it made in the last."""
        draws = torch.Generator().manual_seed(plan.seed)
        views = self.views(steps, draws)
        unused = torch.zeros(plan.size, dtype=torch.int64, device=self.device)
        best = Best(torch.zeros((), device=self.device))
        for step in range(steps):
            self.optimizer.zero_grad()
            images = self.render(self.generator, self.noise(plan.size, draws), evaluator)
            found = evaluator(images, unused, views[step])
            images.backward(found.gradient)
            self.optimizer.step()
            last = found.loss.clone()  # what is compiled may write over it
            best.offer(best.found, last, found.terms)
            on_step(step + 1, {"loss": found.loss, **found.terms})
            self.on_images(images.detach(), unused)
        best.require_finite(plan)
        with torch.no_grad():
            labels = self.teacher.model(images).argmax(1)
        return Dream(images.detach(), labels, float(last))


@dataclass(frozen=True, kw_only=True)
class DAFL(Generative):
    """DAFL: a generator trained against the fixed teacher alone (Chen et al., ICCV 2019).

    Labels are the teacher's own choices. Its batches build on one another: the generator goes on
    from where the batch before left it.

    Args:
        images: how many to dream.
        regularizers: the weighted terms; the paper's are ``one_hot`` (1),
            ``information_entropy`` (5) and ``activation`` (0.1).
        batch_size: images made together.
        steps: generator steps for each batch of dreams; the last one's images are kept.
        latent: size of the generator's noise.
        width: channels of the generator at the images' size.
        jitter: largest random shift in pixels of what the teacher sees.
        flip: mirror what the teacher sees left to right in half of the steps; wrong for digits
            and text.
        lr: Adam's learning rate.
        engine: how the teacher is computed.
    """

    jitter: Annotated[int, Field(ge=0)] | None = 0
    steps: Annotated[int, Field(ge=1)] = 1
    lr: Annotated[float, Field(gt=0)] = 1e-3

    dreamer: ClassVar[type[GenerativeDreamer]] = DAFLDreamer

    @property
    def label_weight(self) -> float:
        """None: labels are what the teacher makes of the images."""
        return 0.0
