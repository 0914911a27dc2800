"""One network of each of timm's families is taken in and looked over without a traceback."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "any_network.py"


@pytest.mark.slow
def test_no_family_of_timm_ends_in_a_traceback(tmp_path):
    spec = importlib.util.spec_from_file_location("any_network", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    sys.modules["any_network"] = script  # its dataclass asks for its module
    spec.loader.exec_module(script)
    models = script.models_to_look_at(families=True)
    rows = script.look_over(models, tmp_path / "rows.csv", limit_seconds=120)
    assert {m: r.reason for m, r in rows.items() if r.outcome == "traceback"} == {}
    assert sum(row.outcome == "done" for row in rows.values()) > len(models) // 2
