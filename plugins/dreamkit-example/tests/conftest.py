"""Makes the package importable from its folder, and installed where a test asks for that."""

from __future__ import annotations

import configparser
import importlib
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLE))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Install the distribution, as far as Python can tell; return what dreamkit calls it."""
    config = configparser.ConfigParser()
    config.read(EXAMPLE / "setup.cfg")
    name, version = config["metadata"]["name"], config["metadata"]["version"]
    site = tmp_path / "site-packages"
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    points = config["options.entry_points"]["dreamkit"].strip()
    (info / "entry_points.txt").write_text(f"[dreamkit]\n{points}\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("DREAMKIT_PLUGINS", name)
    importlib.invalidate_caches()
    return f"{name} {version}"
