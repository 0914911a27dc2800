"""Rows of benchmarks/int8.py by other tools: their files are judged as dreamkit's are."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import dreamkit

for needed in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(needed, reason="needs the extra onnx")

TOOL = """
class Dataset:
    def __init__(self, items, transform):
        self.given = [transform(item) for item in items]

def quantize(network, dataset, subset_size):
    assert [list(item) for item in dataset.given] == [["images"]] * subset_size
    assert dataset.given[0]["images"].shape == (1, 1, 8, 8)
    for weight in network.graph.initializer:
        if weight.name == "fc.bias":  # every image is a zero: the file is told from the network's
            shifted = b"\\x00\\x00\\xc8\\x42" + bytes(36)
            weight.raw_data = shifted
    return network
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("int8")


def test_a_rivals_file_is_judged_as_any(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nncf.py").write_text(TOOL)
    (tmp_path / "nncf-3.4.0.dist-info").mkdir()
    (tmp_path / "nncf-3.4.0.dist-info" / "METADATA").write_text("Name: nncf\nVersion: 3.4.0\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    teacher = dreamkit.load_teacher("bundled:digits_resnet8")
    images = torch.randint(256, (64, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    found = dreamkit.quantize(
        teacher,
        images.byte(),
        quantizer=script.Rival("nncf", sys.executable, teacher.model),
        evaluation=(images.byte(), torch.zeros(64, dtype=torch.long)),
        max_disagreement=1,
        latency_batches=(),
        progress=False,
        device="cpu",
    )
    assert found.about["quantization"] == {"tool": "nncf", "version": "3.4.0"}
    assert found.metrics["int8.accuracy"] == 1  # zeros, all of them
    assert found.metrics["int8.evaluation_agreement"] == found.metrics["teacher.accuracy"] < 1


@pytest.mark.parametrize("rival", ["aimet=python", "nncf", "nncf="])
def test_rivals_are_named_with_their_interpreter(
    script: ModuleType,
    rival: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["int8.py", "--rivals", rival])
    with pytest.raises(SystemExit):
        script.main()
    assert "TOOL=PYTHON with a tool of nncf, mct" in capsys.readouterr().err
