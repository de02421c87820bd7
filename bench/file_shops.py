"""The exports of docs/mappings, with what is right for their made-up files: cases of :mod:`bench.files`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from bench.file_cases import NO_USER, Case, Content

FOLDER = Path(__file__).parents[1] / "docs" / "mappings"


@dataclass(frozen=True)
class Shop(Case):
    """A folder of docs/mappings.

    Attributes:
        name: of the folder.
        tables: logs that read the five lines.
    """

    files: dict[str, Content] = field(default_factory=dict)
    name: str = ""
    tables: int = 1
    events: Sequence[str] = ()
    folder: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for path in (FOLDER / self.name).iterdir():
            if path.suffix != ".yaml":
                self.files[path.name] = path.read_bytes()

    @property
    def yaml(self) -> str:
        """Text of the mapping."""
        return (FOLDER / self.name / "shop.yaml").read_text(encoding="utf-8")

    @property
    def records(self) -> int:
        """Records that the files have, counted for each table that reads them."""
        return (6 if self.name == "shopify-json" else 5) * self.tables  # one of its orders has two lines


def shop(name: str, *events: str, refused: int = 0, left_out: int = 0, tables: int = 1) -> Shop:
    """Return the case of a folder; ``refused`` rows have no user."""
    return Shop(
        name=name, events=events, refused={NO_USER: refused} if refused else {}, left_out=left_out, tables=tables
    )


SESSIONS = ("72d76fde-0000-4000-8000-000000000001", "9333dfbd-0000-4000-8000-000000000002")
SHOPS: dict[str, Shop] = {
    "magento": shop(
        "magento",
        "anna@example.com 1 44.10",
        "ben@example.com 2 9.00 2024-05-02",
        "anna@example.com 4 10.00 2024-05-04",
        left_out=2,
    ),
    "olist": shop(
        "olist",
        "7c396fd40001 e481f51c0001 38.71 2017-10-02",
        "7c396fd40001 53cdb2fc0002 141.46 2018-07-24",
        "3a51803c0002 47770eb90003 179.12 2018-08-08",
        "3a51803c0002 47770eb90003 179.12 2018-08-08",
        left_out=1,
    ),
    "online-retail": shop(
        "online-retail",
        "17850 536365 15.30 2010-12-01",
        "12583 536370 90.00 2010-12-01",
        "17850 C536391 -19.80 2010-12-01",
        refused=1,
        left_out=1,
    ),
    "online-retail-ii": shop(
        "online-retail-ii",
        "13085 489434 83.40 2009-12-01",
        "13085 489434 81.00 2009-12-01",
        "16321 C489449 -35.40 2009-12-01",
        "12680 581587 14.85 2011-12-09",
        refused=1,
    ),
    "rees46": shop(
        "rees46",
        f"541312140 {SESSIONS[0]} 130.76 2019-10-01",
        f"554748717 {SESSIONS[1]} 251.74 2019-10-01",
        "541312140 browse 2019-10-01",
        "541312140 cart 2019-10-01",
        "554748717 browse 2019-10-01",
        left_out=3 + 2,
        tables=2,
    ),
    "shopify": shop(
        "shopify",
        "anna@example.com #1001 53.91",
        "ben@example.com #1002 20.00 2024-05-03",
        refused=1,
        left_out=2,
    ),
    "shopify-json": shop(
        "shopify-json",
        "7100000000001 5500000000001 26.96",
        "7100000000001 5500000000001 26.95",
        "7100000000002 5500000000002 20.00 2024-05-03",
        refused=1,
        left_out=2,
    ),
    "taobao": shop(
        "taobao",
        "1 2017-11-25T09:21:25 1.00 2017-11-25",
        "100 2017-11-25T21:28:01 1.00 2017-11-25",
        "1 browse 2017-11-25",
        "1 cart 2017-11-25",
        "100 favourite 2017-11-25",
        left_out=3 + 2,
        tables=2,
    ),
    "woocommerce": shop(
        "woocommerce",
        "anna@example.com 201 36.00",
        "anna@example.com 201 10.00",
        "ben@example.com 202 20.00 2024-05-02",
        refused=1,
        left_out=1,
    ),
}
"""Folder of docs/mappings -> case. All amounts and days are computed by hand."""
