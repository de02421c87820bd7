"""A Java that only tells its version."""

from __future__ import annotations

from pathlib import Path


def fake_java(home: Path, version: str) -> Path:
    """A Java home whose ``java`` only tells its version, on standard error as Java does."""
    java = home / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2025-04-15' >&2\n")
    java.chmod(0o755)
    return home
