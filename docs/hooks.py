"""MkDocs hooks: what the site shows otherwise than a view of the repository."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^][]+)\]\(\.\./[^)\n]+\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to files outside of docs/, which the site does not have, become their text."""
    return OUTSIDE.sub(r"\1", markdown)
