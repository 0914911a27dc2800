"""Teachers from timm, which is imported when one is asked for: listing does without."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from dreamkit.card import Card
from dreamkit.errors import OptionError, did_you_mean
from dreamkit.model_state import seeded
from dreamkit.teachers.weights import (
    check_weights,
    download,
    hash_weights,
    is_weights_file,
    load_file,
)
from dreamkit.types import Teacher, TeacherSource


@dataclass(frozen=True)
class TimmTeacher(TeacherSource):
    """Any timm classifier; size, mean, std and classes are read off timm's own metadata.

    Args:
        model: a name of ``timm.list_models()``, with or without a pretrained tag, or
            ``hf-hub:owner/name``.
        weights: ``default``, a pretrained tag such as ``a1_in1k``, the path of a file, or null for
            random weights.
        num_classes: outputs of a model whose weights are a file or random.
        input_size: (channels, height, width), where it is not the one timm states.
    """

    model: str
    weights: str | None = "default"
    num_classes: Annotated[int, Field(ge=2)] | None = None
    input_size: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        import timm

        name = self.model.partition(".")[0]
        if not name.startswith("hf-hub:") and not timm.is_model(name):
            hint = did_you_mean(name, timm.list_models())
            raise OptionError("model", f"timm has no model '{name}'{hint}")
        if is_weights_file(self.weights):
            check_weights("weights", str(self.weights))
        elif self.weights is not None:
            if self.num_classes is not None:
                raise OptionError("num_classes", "only for weights from a file or null")
            if not name.startswith("hf-hub:"):
                self._check_tag(name)

    @classmethod
    def known_models(cls, pretrained: bool) -> list[str]:
        """Return architectures, those with weights if asked for, and then every pretrained tag."""
        import timm

        names = timm.list_models(pretrained=pretrained, include_tags=False)
        return [*names, *timm.list_pretrained()]

    def _check_tag(self, name: str) -> None:
        import timm

        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{name}.*")]
        tag = self._full_name.partition(".")[2]
        if not tags or (tag and tag not in tags):
            choices = ", ".join(tags) or "none"
            raise OptionError(
                "weights" if self.weights != "default" else "model",
                f"timm has no pretrained '{self._full_name}'{did_you_mean(tag, tags)} "
                f"(tags: {choices}); weights may also be the path of a file, or null",
            )

    def build(self) -> nn.Module:
        """Return the architecture with random weights."""
        return self._create(pretrained=False)

    def load(self, seed: int) -> Teacher:
        """Return the model in eval mode with its card."""
        if self.weights is None or is_weights_file(self.weights):
            with seeded(seed):
                model = self.build()
        else:
            model = download(f"timm/{self._full_name}", lambda: self._create(pretrained=True))
        origin = f"timm/{self._full_name}"
        said: list[str] = []
        if is_weights_file(self.weights):
            said = load_file(model, str(self.weights))
            origin = str(self.weights)
        card = self._card(model, "random weights" if self.weights is None else origin)
        builder = dataclasses.asdict(self) | {"source": "timm", "weights": None}
        builder |= {"num_classes": card.num_classes}
        return Teacher(model.eval(), card, builder, notes=tuple(said))

    @property
    def _full_name(self) -> str:
        named = self.weights not in {None, "default"} and not is_weights_file(self.weights)
        return f"{self.model.partition('.')[0]}.{self.weights}" if named else self.model

    def _create(self, pretrained: bool) -> nn.Module:
        import timm

        options: dict[str, Any] = {}
        if self.num_classes is not None:
            options["num_classes"] = self.num_classes
        if self.input_size is not None:
            options["in_chans"] = self.input_size[0]
        model: nn.Module = timm.create_model(self._full_name, pretrained=pretrained, **options)
        return model

    def _card(self, model: nn.Module, origin: str) -> Card:
        stated: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        size = self.input_size or tuple(stated["input_size"])
        mean, std = (tuple(float(v) for v in stated[key]) for key in ("mean", "std"))
        if size[0] != len(mean):
            # timm folds RGB weights to other channel counts; one mean serves each of them then.
            mean = (sum(mean) / len(mean),) * size[0]
            std = (sum(std) / len(std),) * size[0]
        return Card(
            name=f"timm/{self.model}",
            input_size=size,
            mean=mean,
            std=std,
            num_classes=int(model.num_classes),  # type: ignore[arg-type]
            origin=origin,
            trained=self.weights is not None,
            weights_sha256=hash_weights(model),
        )
