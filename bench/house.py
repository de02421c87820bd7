"""How large the rooms of the house are and what leads in circles: ``python -m bench.house``.

In: the source tree. Out: a line of JSON a figure on standard output.

- ``largest_module_lines``, ``median_module_lines``, ``source_lines``: lines of the modules of ``src/bp_spark``.
- ``packages``: folders of ``src/bp_spark`` that hold modules.
- ``import_cycles``: groups of packages of the first level that import one another in a circle; type hints count too.
- ``settings``, ``settings_with_one_description``: all settings, and those that the code describes once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median

import grimp

import bp_spark
from bench import say
from docs.reference import described_settings

SOURCE = Path(bp_spark.__file__).parent


def lines_by_module(source: Path = SOURCE) -> dict[str, int]:
    """Return the lines of each module below a folder, by its path."""
    return {
        str(path.relative_to(source)): len(path.read_text(encoding="utf-8").splitlines())
        for path in sorted(source.rglob("*.py"))
    }


def imports_by_package(package: str = "bp_spark") -> dict[str, set[str]]:
    """Return which packages of the first level each of them imports."""
    graph = grimp.build_graph(package)
    imported: dict[str, set[str]] = {}
    for module in graph.modules:
        if module == package:
            # the public face imports what stands above it, when it is called
            continue
        own = module.split(".")[1]
        others = {found.split(".")[1] for found in graph.find_modules_directly_imported_by(module) if found != package}
        imported.setdefault(own, set()).update(others - {own})
    return imported


def cycles(imports: Mapping[str, Iterable[str]]) -> int:
    """Return how many groups of two or more nodes reach one another (strongly connected components)."""
    reachable: dict[str, set[str]] = {}
    for start in imports:
        reached: set[str] = set()
        waiting = list(imports[start])
        while waiting:
            node = waiting.pop()
            if node not in reached:
                reached.add(node)
                waiting.extend(imports.get(node, ()))
        reachable[start] = reached
    groups = {
        frozenset(other for other in reachable if other in reachable[node] and node in reachable[other])
        for node in reachable
        if node in reachable[node]
    }
    return len(groups)


def measure() -> dict[str, float]:
    """Return all figures by name."""
    lines = lines_by_module()
    described, settings = described_settings()
    return {
        "largest_module_lines": max(lines.values()),
        "median_module_lines": median(count for count in lines.values() if count > 1),
        "source_lines": sum(lines.values()),
        "packages": len({str(Path(path).parent) for path in lines}),
        "import_cycles": cycles(imports_by_package()),
        "settings": settings,
        "settings_with_one_description": described,
    }


def main() -> None:
    """Print the figures."""
    for name, value in measure().items():
        say(f"house.{name}", value)


if __name__ == "__main__":
    main()
