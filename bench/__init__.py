"""Measurements side by side; results go to ``build/bench``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def publish(figures: Mapping[str, Any], out: Path) -> None:
    """Write the figures to a file as JSON, and to standard output."""
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(figures, indent=2)
    out.write_text(text + "\n", encoding="utf-8")
    print(text)
