"""NAYER: what makes images differ is a layer drawn at random, between labels and generator.

Tran et al., "NAYER: Noisy Layer Data Generation for Efficient and Effective Data-free Knowledge
Distillation", CVPR 2024. With the terms ``bn_feature`` (its form ``paper``, weight 10) and
``adversarial`` (1.33), and 0.5 of the cross-entropy, it is the paper's but for the embeddings of
labels: the authors take a language model's of the classes' names, and here they are the rows of
the teacher's classifier, which lie close where the teacher finds classes alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from dreamkit.errors import DreamkitError, TeacherMismatch
from dreamkit.evaluation.features import find_layer
from dreamkit.flat_state import below, prefixed
from dreamkit.model_state import seeded
from dreamkit.seeds import derived_seed
from dreamkit.synthesizers.dreamer import Session
from dreamkit.synthesizers.engine import Evaluator
from dreamkit.synthesizers.generative import BETAS, GenerativeDreamer
from dreamkit.synthesizers.labels import deal_labels
from dreamkit.synthesizers.matching import Adaptation, Matching, MatchingDreamer
from dreamkit.types import BatchPlan, Dream, OnStep, Teacher


def label_embeddings(teacher: Teacher) -> Tensor:
    """Return a vector for each class: its row in the teacher's last linear layer, (K, D) float32.

    Raises:
        TeacherMismatch: there is no such layer, it has other outputs, or there is one class alone.
    """
    card = teacher.card
    others = "fast_meta, cmi and dafl do without"
    try:
        name, layer = find_layer(teacher.model, card, None)
    except DreamkitError as error:
        raise TeacherMismatch(
            f"nayer takes the rows of the last linear layer as embeddings of the labels, and "
            f"{card.name} calls none; {others}"
        ) from error
    assert isinstance(layer, nn.Linear)
    if layer.out_features != card.num_classes:
        raise TeacherMismatch(
            f"nayer takes the rows of the last linear layer as embeddings of the labels, and "
            f"'{name}' of {card.name} has {layer.out_features} for {card.num_classes} classes; "
            f"{others}"
        )
    if card.num_classes < 2:
        raise TeacherMismatch(
            f"nayer compares embeddings of labels, and {card.name} has one class; {others}"
        )
    return layer.weight.detach().float().clone()


class NoisyLayers(nn.Module):
    """Embeddings of labels to a generator's inputs: BatchNorm, then linear layers of noise.

    A layer takes a class once at the most, so that no two inputs are the same: images of one class
    go through different layers, those of different classes share one (the paper's K-to-1).
    Statistics are those of all classes. Weights are drawn from N(0, 1), biases are 0; they are
    trained with the generator.

    Args:
        embeddings: (K, D).
        layers: how many.
        latent: size of the inputs that they make.
    """

    def __init__(self, embeddings: Tensor, layers: int, latent: int) -> None:
        super().__init__()
        size = embeddings.shape[1]
        self.embeddings: Tensor
        self.register_buffer("embeddings", embeddings)
        self.bn = nn.BatchNorm1d(size)
        self.weight = nn.Parameter(torch.randn(layers, size, latent))
        self.bias = nn.Parameter(torch.zeros(layers, 1, latent))

    def forward(self, places: Tensor) -> Tensor:
        """Map each layer and class, given as layer * K + class (N,), to an input (N, latent)."""
        made: Tensor = self.bn(self.embeddings) @ self.weight + self.bias
        return made.flatten(0, 1)[places]


class NAYERDreamer(MatchingDreamer):
    """NAYER bound to a teacher; it carries its generator until that is drawn anew."""

    def __init__(self, options: NAYER, session: Session) -> None:
        super().__init__(options, session)
        self.options = options
        self.seed = session.seed
        self.embeddings = label_embeddings(session.teacher)
        self.life = 0
        """How often the generator was drawn anew."""
        self.generator = self._generator_of(0)

    def _generator_of(self, life: int) -> nn.Module:
        return self.new_generator(derived_seed(self.seed, f"generator {life}"))

    def state(self) -> dict[str, Tensor]:
        """Return the generator, how often it was drawn anew, and the smoothed statistics."""
        state = prefixed("generator", self.generator.state_dict()) | super().state()
        return state | {"life": torch.tensor(self.life)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state that ``state`` returned."""
        super().restore(state)
        self.generator.load_state_dict(below("generator", state))
        self.life = int(state["life"])

    def take_steps(
        self, plan: BatchPlan, steps: int, evaluator: Evaluator, on_step: OnStep
    ) -> Dream:
        """Train the generator for some steps with noisy layers of this batch's own."""
        options, classes = self.options, len(self.embeddings)
        life = plan.index // options.reset_every if options.reset_every else 0
        if life != self.life:  # by what it is, not when it is due: the batch may have been left out
            self.generator, self.life = self._generator_of(life), life
        draws = torch.Generator().manual_seed(plan.seed)
        labels = deal_labels("balanced", self.teacher.card, self.seed, plan, draws).to(self.device)
        # A round of labels has each class once, and a batch may begin in the middle of one.
        layers = (plan.first_image % classes + torch.arange(plan.size)) // classes
        with seeded(plan.seed ^ 1):  # other draws than those of the views
            noisy = NoisyLayers(self.embeddings.cpu(), int(layers[-1]) + 1, options.latent)
        network = nn.Sequential(noisy.to(self.device), self.generator)
        optimizer = torch.optim.Adam(network.parameters(), lr=options.lr, betas=BETAS)
        places = layers.to(self.device) * classes + labels
        views = self.views(steps, draws)
        adaptation = Adaptation(network, places, labels, views, optimizer)
        return self.adapt(plan, adaptation, evaluator, on_step)


@dataclass(frozen=True, kw_only=True)
class NAYER(Matching):
    """NAYER: labels reach a generator through a layer of noise (Tran et al., CVPR 2024).

    What makes images of one class differ is no noise beside the label: labels are dealt in rounds
    of all classes, and each round of each batch has a linear layer, drawn anew, between embeddings
    and generator. The generator goes on from batch to batch and is drawn anew from time to time,
    so batches build on one another. The authors' embeddings are a language model's of the classes'
    names; here they are the rows of the teacher's last linear layer, which it must have. What the
    teacher sees is rolled and mirrored as one, where the authors crop and mirror each image.

    Args:
        images: how many to dream.
        regularizers: the weighted terms; the paper's are ``bn_feature`` in its form ``paper``
            (10) and ``adversarial`` (1.33), which needs a student in training.
        cross_entropy: weight of the cross-entropy to the labels.
        batch_size: images made together, over which feature statistics are taken.
        steps: generator steps for each batch; its best images are kept.
        latent: size of what the noisy layers make of a label (the authors' 1000).
        width: channels of the generator at the images' size.
        jitter: largest random shift in pixels of what the teacher sees; null is an eighth of the
            side (4 at 32×32).
        flip: mirror what the teacher sees left to right in half of the steps; wrong for digits
            and text.
        lr: Adam's learning rate for the generator and the noisy layers.
        reset_every: batches after which the generator is drawn anew (the authors' 10 epochs of 2
            batches); null is never.
        smoothing: share of earlier batches in the statistics that are matched, a moving average;
            0 matches each batch's own.
        warmup: the first batch, counted from 1, in which terms that need the student count (the
            authors' comes after 20 epochs of 10 batches).
        engine: how the teacher is computed.
    """

    batch_size: Annotated[int, Field(ge=2)] = 400
    steps: Annotated[int, Field(ge=1)] = 40
    lr: Annotated[float, Field(gt=0)] = 4e-3
    reset_every: Annotated[int, Field(ge=1)] | None = 20

    dreamer: ClassVar[type[GenerativeDreamer]] = NAYERDreamer

    def check(self, teacher: Teacher) -> None:
        """Refuse a teacher that the terms do not fit, or one without embeddings of labels."""
        super().check(teacher)
        label_embeddings(teacher)
