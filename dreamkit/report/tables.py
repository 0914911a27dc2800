"""The tables of a run: teacher, pruned, student side by side, and what verifiers see in dreams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODELS = ("teacher", "resized", "pruned", "student")
_NAMES = {"resized": "teacher, on smaller images", "pruned": "pruned, before recovery"}
_COLUMNS = (
    ("accuracy", "accuracy"),
    ("agreement", "agreement with the teacher"),
    ("params", "parameters"),
    ("flops", "FLOPs"),
    ("latency_ms", "latency"),
)


def summary_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the table's header and rows, without those that nothing was measured for.

    A cell that does not apply is a dash.
    """
    metrics = report["metrics"]
    shown = [
        (key, title)
        for key, title in _COLUMNS
        if any(f"{model}.{key}" in metrics for model in MODELS)
    ]
    rows = []
    for model in MODELS:
        cells = [_cell(key, metrics.get(f"{model}.{key}")) for key, _ in shown]
        if any(cell != "-" for cell in cells):
            rows.append([_NAMES.get(model, model), *cells])
    titles = {**dict(shown), "agreement": _agreement_title(report)}
    return ["model", *(titles[key] for key, _ in shown)], rows


def _agreement_title(report: Mapping[str, Any]) -> str:
    """Return the column's title, which says on which images agreement was measured."""
    told = report["details"].get("agreement", {}).values()
    if not told or not all(measured["held_out"] for measured in told):
        return "agreement with the teacher, on its training images"
    images = "dreams" if "synthesis.images" in report["metrics"] else "images"
    return f"agreement with the teacher, on held-out {images}"


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key in {"accuracy", "agreement"}:
        return f"{value:.4f}"
    if key == "latency_ms":
        return f"{value:.3f} ms"
    return quantity(value)


def judge_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of what verifiers said of the images, one row each; none if none did.

    Every number stands with what it was taken over: images, splits, real images and layer.
    """
    judged = report["details"].get("judge", {})
    rows = []
    for verifier in judged.get("verifiers", ()):
        known = {
            key: report["metrics"].get(f"judge.{verifier['name']}.{key}")
            for key in ("accuracy", "classifier_score", "classifier_score_std", "frechet_distance")
        }
        accuracy, score, deviation, distance = known.values()
        row = [verifier["name"], str(judged["images"]), _cell("accuracy", accuracy)]
        row.append("-" if score is None else f"{score:.3f} ± {deviation:.3f}")
        row.append("-" if distance is None else f"{distance:.3f} at {verifier['layer']}")
        rows.append(row)
    real = judged.get("reference_images")
    header = ["verifier", "images", "accuracy", f"classifier score, {judged.get('splits')} splits"]
    header.append(f"Fréchet distance to {real} real images" if real else "Fréchet distance")
    return header, rows


def pixel_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the pixels of dreams beside those of training images."""
    told = report["details"].get("pixels", {})
    header = ["pixels in [0, 1]", "mean", "spread", "distance from grey", "at 0 or 255"]
    names = {"dreams": "dreams", "training": "training images, by the first layer"}
    rows = []
    for key, title in names.items():
        if told.get(key) is not None:
            values = told[key]
            shares = [f"{100 * share:.1f} %" for share in values.get("clipped", ())]
            cells = [[f"{value:.3f}" for value in values[name]] for name in ("mean", "std")]
            cells += [[f"{values['chroma']:.3f}"], shares]
            rows.append([title, *(", ".join(cell) or "-" for cell in cells)])
    return header, rows


def quantization_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a file in float and one in integers; none if there are none."""
    told, metrics = report["details"].get("quantization"), report["metrics"]
    if told is None:
        return [], []
    unseen = "unseen images" if told["compared"]["unseen"] else "calibration images"
    header = ["file", "accuracy", f"agreement, {unseen}", "size"]
    header += [
        f"ms for {row['batch_size']}, {row['threads']} thread{'s' if row['threads'] > 1 else ''}"
        for row in told.get("latency", ())
    ]
    rows = []
    for name, measured in (("float", told["network"]), ("int8", "int8")):
        cells = [_cell("accuracy", metrics.get(f"{measured}.accuracy"))]
        cells.append(_cell("agreement", metrics.get(f"{name}.agreement")))
        cells.append(f"{quantity(metrics[f'{name}.bytes'])}B")
        times = [row[f"{name}_ms"] for row in told.get("latency", ())]
        title = f"{told['network']}, {name}"
        rows.append([title, *cells, *(f"{ms:.3g}" for ms in times)])
    return header, rows


def noise_line(report: Mapping[str, Any], shown: int = 5) -> str | None:
    """Return a sentence with the layers that integers make most noise of, the worst first."""
    noise = report["details"].get("quantization", {}).get("noise")
    if not noise:
        return None
    worst = ", ".join(f"{name} ({level:.1f} dB)" for name, level in list(noise.items())[:shown])
    return f"The layers that integers make most noise of, as signal to noise: {worst}"


def continual_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of what was known of each set of classes after each step."""
    told = report["details"].get("continual")
    if told is None:
        return [], []
    metrics, rows = report["metrics"], []
    for step in range(len(told["steps"])):
        keys = [f"step{step}.{name}.accuracy" for name in told["sets"]]
        keys += [f"step{step}.{name}" for name in ("combined", "accuracy", "forgetting")]
        cells = [_cell("accuracy", metrics.get(key)) for key in keys]
        rows.append(["before" if step == 0 else f"after {told['sets'][step]}", *cells])
    return ["accuracy", *told["sets"], "combined", "of all images", "forgetting"], rows


def depth_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the whole blocks that were tried beside channels."""
    tried = report["details"].get("depth")
    if not tried:
        return [], []
    goals = list(tried[0]["shares"])
    header = ["block", "divergence without it", "without channels that save as much", "agreement"]
    rows = []
    for told in tried:
        other = told["divergence_by_channels"]
        cells = [told["block"], f"{told['divergence']:.4f}"]
        cells.append("no such channels" if other is None else f"{other:.4f}")
        cells.append(_cell("agreement", told["agreement"]))
        cells += [f"{100 * told['shares'][goal]:.1f} %" for goal in goals]
        rows.append([*cells, "went" if told["gone"] else "stayed"])
    return [*header, *(f"{goal} left" for goal in goals), ""], rows


def sensitivity_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of what removing parts of each channel group did by itself."""
    told = report["details"].get("sensitivity")
    if told is None:
        return [], []
    header = ["agreement without", *(f"{100 * share:.3g} %" for share in told["shares"])]
    looked = dict(told["agreement"])
    if told["whole_agreement"] < 1:  # then a group has not lost all that is lacking
        looked = {"(nothing)": [told["whole_agreement"]] * len(told["shares"])} | looked
    rows = [
        [group, *(_cell("agreement", value) for value in found)] for group, found in looked.items()
    ]
    return header, rows


def fidelity_line(report: Mapping[str, Any]) -> str | None:
    """Return a sentence with the Inception score and FID, None where they were not computed."""
    metrics, judged = report["metrics"], report["details"].get("judge", {})
    score = metrics.get("judge.inception_score")
    if score is None:
        return None
    line = (
        f"Inception score {score:.3f} ± {metrics['judge.inception_score_std']:.3f} of "
        f"{judged['images']} images in {judged['splits']} splits"
    )
    if "judge.fid" in metrics:
        line += f", FID {metrics['judge.fid']:.3f} to {judged['reference_images']} real images"
    return line + " (torch-fidelity)"


def dreams_line(report: Mapping[str, Any]) -> str | None:
    """Return a sentence on the dreams' statistics and the worst layer; None if none were taken."""
    mean = report["metrics"].get("synthesis.statistics_distance")
    by_layer = report["details"].get("statistics_distance")
    if mean is None or not by_layer:
        return None
    return f"The dreams' statistics are {distance_said(mean, by_layer)}"


def distance_said(mean: float, by_layer: Mapping[str, float]) -> str:
    """Return how far statistics are from training's, for people."""
    worst = max(by_layer, key=lambda name: by_layer[name])
    return (
        f"{mean:.2f} times as far from training's as that many training images are by chance "
        f"(furthest: {worst}, {by_layer[worst]:.2f})"
    )


def quantity(value: float) -> str:
    """Write a count with three significant digits and k, M, G."""
    rounded = float(f"{value:.3g}")
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if rounded >= size:
            return f"{rounded / size:.3g} {unit}"
    return f"{rounded:.3g}"
