"""``report.html``: one page that holds everything, without a file or a server beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader
from PIL import Image

from dreamkit.report.figures import curves, heat_map, sensitivity
from dreamkit.report.notebook import data_uri
from dreamkit.report.tables import (
    continual_rows,
    depth_rows,
    dreams_line,
    fidelity_line,
    judge_rows,
    noise_line,
    pixel_rows,
    quantization_rows,
    sensitivity_rows,
    summary_rows,
)

_NO_CURVE = {"statistics distance by layer"}


def render(
    report: Mapping[str, Any],
    records: Mapping[str, Mapping[int, Mapping[str, float | None]]],
    recipe_yaml: str,
    pictures: Mapping[str, Image.Image],
) -> str:
    """Return the page.

    Args:
        report: the content of ``report.json``.
        records: of ``log.jsonl``, by stage.
        recipe_yaml: the recipe as it ran.
        pictures: grids of dreams, each with its title.
    """
    header, rows = summary_rows(report)
    judge_header, judged = judge_rows(report)
    learnt_header, learnt = continual_rows(report)
    files_header, files = quantization_rows(report)
    pixel_header, pixels = pixel_rows(report)
    told = report["details"].get("continual")
    blocks_header, blocks = depth_rows(report)
    groups_header, groups = sensitivity_rows(report)
    measured = report["details"].get("sensitivity")
    environment = Environment(
        loader=PackageLoader("dreamkit.report", ""), autoescape=True, keep_trailing_newline=True
    )
    return environment.get_template("report.html.j2").render(
        report=report,
        header=header,
        rows=rows,
        judge_header=judge_header,
        judged=judged,
        files_header=files_header,
        files=files,
        noise=noise_line(report),
        fidelity=fidelity_line(report),
        pixel_header=pixel_header,
        pixels=pixels,
        pictures={title: data_uri(picture) for title, picture in pictures.items()},
        learnt_header=learnt_header,
        learnt=learnt,
        confusion=heat_map(told["confusion"], told["class_names"]) if told else None,
        stages={n: curves(n, r) for n, r in records.items() if r and n not in _NO_CURVE},
        layers=report["details"].get("statistics_distance", {}),
        dreams=dreams_line(report),
        blocks_header=blocks_header,
        blocks=blocks,
        groups_header=groups_header,
        groups=groups,
        sensitivity=sensitivity(measured["shares"], measured["agreement"]) if measured else None,
        recipe_yaml=recipe_yaml,
    )
