"""Any CNN: networks of torchvision and timm lose channels, are saved, and come back elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

from dreamkit.card import Card
from dreamkit.plugins import build_registries
from dreamkit.pruning.graph import ChannelGraph
from dreamkit.recipe import build_entry
from dreamkit.store.artifact import write_artifact

NETWORKS = {
    "torchvision": (
        *("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "vgg11_bn"),
        *("mobilenet_v2", "mobilenet_v3_small", "densenet121", "shufflenet_v2_x1_0", "mnasnet1_0"),
        *("regnet_y_400mf", "efficientnet_b0", "googlenet", "inception_v3"),
    ),
    "timm": (
        *("resnet50", "resnetv2_50", "mobilenetv3_small_100", "efficientnet_lite0", "regnety_002"),
        *("cspresnet50", "dla34", "hrnet_w18_small", "repvgg_a0", "ghostnet_100", "rexnet_100"),
        "convnext_atto",
    ),
}
ALL = [(source, model) for source, models in NETWORKS.items() for model in models]
ALWAYS = [("torchvision", "shufflenet_v2_x1_0"), ("timm", "convnext_atto")]
SIZES = {"inception_v3": 96}

ELSEWHERE = """
import sys
import dreamkit, safetensors.torch, torch
from pathlib import Path
for folder in sys.argv[1:]:
    model = dreamkit.load_student(Path(folder) / "student")
    x = safetensors.torch.load_file(f"{folder}/x.safetensors")["x"]
    with torch.no_grad():
        safetensors.torch.save_file({"y": model(x)}, f"{folder}/y.safetensors")
"""


def build(source, model):
    entry = build_entry(
        build_registries(), "teachers", {"source": source, "model": model, "weights": None}
    )
    return entry.build().eval()


def pruned_and_saved(source, model, folder):
    """Remove 30 % of the channels of every group and save what is left; return it."""
    network = build(source, model)
    size = SIZES.get(model, 64)
    before = sum(p.numel() for p in network.parameters())
    graph = ChannelGraph(network, (3, size, size))
    groups, skipped = graph.groups()
    assert [s.reason for s in skipped] == ["makes the model's outputs"]
    draws = torch.Generator().manual_seed(0)
    removed = {
        group.name: torch.randperm(group.channels, generator=draws)[
            : round(0.3 * group.channels)
        ].tolist()
        for group in groups
    }
    graph.remove(removed)
    left = sum(p.numel() for p in network.parameters()) / before
    assert 0.4 < left < 0.8, "0.7² of most weights"
    again, _ = ChannelGraph(network, (3, size, size)).groups()
    assert sum(g.channels for g in again) == sum(g.channels for g in groups) - sum(
        map(len, removed.values())
    )
    card = Card(model, (3, size, size), (0.5,) * 3, (0.5,) * 3, 1000, "random")
    builder = {"source": source, "model": model, "weights": None}
    write_artifact(folder / "student", network, card, builder, graph.pruning_record.to_json())
    x = torch.randn(2, 3, size, size, generator=draws)
    safetensors.torch.save_file({"x": x}, folder / "x.safetensors")
    with torch.no_grad():
        return network(x)


def differing(networks, folder: Path) -> list[str]:
    """Prune networks; return those whose outputs are others once they are loaded elsewhere."""
    expected = {}
    for source, model in networks:
        place = folder / f"{source}-{model}"
        place.mkdir()
        expected[place] = pruned_and_saved(source, model, place)
    subprocess.run([sys.executable, "-c", ELSEWHERE, *map(str, expected)], check=True)
    return [
        place.name
        for place, outputs in expected.items()
        if not torch.allclose(
            safetensors.torch.load_file(place / "y.safetensors")["y"], outputs, 1e-5, 1e-5
        )
    ]


def test_some_networks(tmp_path):
    assert differing(ALWAYS, tmp_path) == []


@pytest.mark.slow
def test_every_network(tmp_path):
    assert differing([pair for pair in ALL if pair not in ALWAYS], tmp_path) == []


@pytest.mark.slow
def test_a_network_without_batch_norm_is_pruned_on_images_of_a_folder(
    tmp_path, invoke, recipe_file
):
    draws = torch.Generator().manual_seed(0)
    for name in ("one", "two"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(8):
            pixels = torch.randint(0, 256, (32, 32, 3), generator=draws, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / "images" / name / f"{number}.png")
    size = {"input_size": [3, 32, 32]}
    recipe = {
        "name": "convnext",
        "device": "cpu",
        "teacher": {"source": "timm", "model": "convnext_atto", "weights": None, **size},
        "application": {
            "name": "prune",
            "criteria": [{"name": "taylor", "weight": 1}],
            "target": {"flops": 0.8},
            "images": {"source": "folder", "path": str(tmp_path / "images"), "labelled": False},
            "ranking_batches": 1,
            "batch_size": 8,
            "step": 0.2,
            "recovery": {"steps": 1, "batch_size": 8},
        },
    }
    code, _, err = invoke("run", recipe_file(recipe), "--out", tmp_path / "run")
    assert code == 0, err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["metrics"]["pruned.flops_ratio"] <= 0.8
    recipe["synthesis"] = {
        "name": "deepinversion",
        "images": 8,
        "batch_size": 8,
        "stages": [{"steps": 1}],
        "regularizers": [{"name": "bn_feature", "weight": 1}],
    }
    recipe["application"].pop("images")
    code, _, err = invoke("run", recipe_file(recipe), "--out", tmp_path / "dreamed")
    assert code == 2
    assert "BatchNorm" in err
