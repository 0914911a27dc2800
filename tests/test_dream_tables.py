"""Tables 2 and 3, and the time until others know the dreams: what is compared, and what is said."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dreamkit.card import Card
from dreamkit.parameterisations.fourier import Fourier
from dreamkit.parameterisations.pixels import Pixels
from dreamkit.registry import Term
from dreamkit.regularizers.bn_feature import BNFeature
from dreamkit.regularizers.l2 import L2Norm
from dreamkit.synthesizers.deepinversion import DeepInversion


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module


def test_ladder_differs_in_its_terms_alone(script: Callable[[str], ModuleType]) -> None:
    full = DeepInversion(
        (Term("l2", 1.0, L2Norm()), Term("bn_feature", 2.0, BNFeature())),
        parameterisation=Fourier(),
    )
    made = script("tables2_3").kinds(full, 0.5)
    terms = {kind: [(t.name, t.weight) for t in one.regularizers] for kind, one in made.items()}
    assert terms == {
        "Noise": [],
        "DeepDream": [("l2", 1.0)],
        "DeepInversion": [("l2", 1.0), ("bn_feature", 2.0)],
        "ADI": [("l2", 1.0), ("bn_feature", 2.0), ("js_compete", 0.5)],
    }
    assert made["Noise"].parameterisation == Pixels()
    assert made["ADI"].parameterisation == Fourier()
    assert list(script("tables2_3").kinds(full, None)) == ["Noise", "DeepDream", "DeepInversion"]


def test_every_class_is_drawn_before_one_comes_again(script: Callable[[str], ModuleType]) -> None:
    card = Card("net", (3, 8, 8), (0.5,) * 3, (0.5,) * 3, 10, "tests")
    drawn = script("given").drawn_classes(card, 25, seed=0)
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == list(range(10))
    assert drawn[:10] != tuple(range(10))
    assert drawn != script("given").drawn_classes(card, 25, seed=1)


def test_methods_take_turns(script: Callable[[str], ModuleType]) -> None:
    methods = {"a": (len, [1, 2, 3]), "b": (len, [10])}
    order = [(name, steps) for name, _, steps in script("time_to_accuracy").in_turn(methods)]
    assert order == [("a", 1), ("b", 10), ("a", 2), ("a", 3)]


def test_conclusion_says_who_was_first_and_by_how_much(
    script: Callable[[str], ModuleType],
) -> None:
    made = script("time_to_accuracy")

    def found(steps: int, seconds: float, verifier: float) -> dict[int, list[object]]:
        return {steps: [made.Found(steps, 2 * seconds, seconds, 1.0, verifier, 0.5, 32)]}

    results = {
        "plain loop": found(50, 100, 0.25) | found(400, 800, 0.5),
        "MCT": found(500, 300, 0.85),
        "dreamkit": found(60, 20, 0.5) | found(120, 40, 0.875),
    }
    assert made.conclusion(results, "processor_seconds").splitlines() == [
        "- verifier 0.8: plain loop not within 800 s, dreamkit more than 20.0 times as fast",
        "- verifier 0.9: plain loop not within 800 s",
        "- plain loop's best, 0.500: 800 s; dreamkit has as much after 20 s, 40.0 times as fast",
        "- verifier 0.8: MCT 300 s, dreamkit 7.5 times as fast",
        "- verifier 0.9: MCT not within 300 s",
        "- MCT's best, 0.850: 300 s; dreamkit has as much after 40 s, 7.5 times as fast",
        "- verifier 0.8: dreamkit 40 s",
        "- verifier 0.9: dreamkit not within 40 s",
    ]
    assert "- verifier 0.8: MCT 600 s, dreamkit 7.5" in made.conclusion(results, "seconds")


def test_plain_loop_is_asked_for_classes_and_mirrors(script: Callable[[str], ModuleType]) -> None:
    seen = []

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm2d(1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images.detach().clone())
            return self.norm(images).flatten(1)[:, :3]

    loop = script("plain_loop").PlainLoop(
        Net().eval(), (2, 1, 2, 2), 3, torch.device("cpu"), lr=0.0, jitter=0,
        labels=torch.tensor([2, 1]), flip=True,
    )  # fmt: skip
    assert loop.labels.tolist() == [2, 1]
    for _ in range(20):
        loop.step()
    start = loop.images.detach()
    mirrored = [torch.equal(one, start.flip(3)) for one in seen]
    assert any(mirrored)
    assert all(
        flipped or torch.equal(one, start) for flipped, one in zip(mirrored, seen, strict=True)
    )
    assert not all(mirrored)
