"""Commands for data engineers: bring data in, look into quarantine, make a synthetic platform."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bp_spark.cli import common, render
from bp_spark.cli.common import ConfigOption, Overrides, StrictOption
from bp_spark.core import config, extras
from bp_spark.core.config import Config
from bp_spark.core.errors import ConfigError

if TYPE_CHECKING:
    from bp_spark.ingest.onboarding.preflight import Preflight

SAMPLE_ROWS = 100_000
"""Rows that a check reads of each table."""

logger = logging.getLogger(__name__)


class QuarantineAction(StrEnum):
    """What can be done with quarantined rows."""

    show = "show"
    replay = "replay"


def init(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Folder to write to; it is made if it isn't there.")],
    orders: Annotated[
        str,
        typer.Option(
            help="Files of orders, or of events with purchases among them: a file, a folder, or a pattern in quotes."
        ),
    ],
    behaviours: Annotated[str | None, typer.Option(help="Files of views, clicks, carts.")] = None,
    searches: Annotated[str | None, typer.Option(help="Files of search queries.")] = None,
    reviews: Annotated[str | None, typer.Option(help="Files of reviews.")] = None,
    items: Annotated[str | None, typer.Option(help="Files of items: titles, categories, brands.")] = None,
    currency: Annotated[
        str | None, typer.Option(help="Currency of the amounts, as EUR; by default it is guessed from the files.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write mapping and settings anew where they exist. The secret stays.")
    ] = False,
) -> None:
    """Look at a shop's files, and write a mapping with guesses and doubts, settings and a secret into a folder.

    CSV, JSON, Parquet and Delta are recognised, and so are separator, encoding, header, and the form of times and amounts.
    Comments in shop.yaml give the reason of each guess, and say what is open. They quote no value of the files.

    Example: bp-spark init my-shop --orders 'exports/*.csv' --currency EUR
    """
    if context.args:
        like = Path(orders).parent / f"*{Path(orders).suffix}"
        raise ConfigError(
            f"init: takes one folder, but {context.args[0]!r} follows it. Put a pattern in quotes, or the shell makes a list "
            f"of files of it: --orders '{like}'"
        )
    extras.require("spark", "a look at files")
    from bp_spark.ingest.onboarding import start

    patterns = {
        "transactions": orders,
        "behaviours": behaviours,
        "searches": searches,
        "reviews": reviews,
        "items": items,
    }
    given = {section: pattern for section, pattern in patterns.items() if pattern is not None}
    result = start.start(folder, given, currency, force=force)
    for table in result.tables:
        rows = [[name, render.guess(one.value), "; ".join(one.comments)] for name, one in table.columns.items()]
        title = f"{table.section}{f', where {table.where}' if table.where else ''}"
        render.show(render.rows_table(["column", "from", "why, and what is open"], rows, title=title))
    render.show(f"Written to {folder}: {start.MAPPING}, {start.SETTINGS} (currency {result.currency}), {start.SECRET}")
    if result.open:
        render.show(f"Fill in first, where TODO stands: {', '.join(result.open)}")
    render.show(
        f"Next: read the comments in {folder / start.MAPPING}, then bp-spark check --config {folder / start.SETTINGS}"
    )


def check(
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(help="Rows to read of each table, spread over its files.", min=1)] = SAMPLE_ROWS,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    config_file: ConfigOption = None,
) -> None:
    """Read a sample of the files as featurize would, and show what it would make of them.

    Mistakes in the mapping, a missing secret, and missing files and columns are shown at once. Then a sample is read. For
    each column the command shows the share of rows that is unreadable, missing or odd. For each rule it shows how many
    rows the rule would refuse. It counts orders, users and money. Nothing is written.

    The command ends with code 3 if no order line could be read or accepted.

    Example: bp-spark check --config my-shop/settings.yaml
    """
    settings = common.load_settings(config_file, overrides)
    found = _preflight(settings)
    from bp_spark.ingest.onboarding import check as checks

    result = checks.check(common.start_session(settings, "check"), settings, found, rows)
    if as_json:
        print(json.dumps({**asdict(result), "share": result.share}, default=str, ensure_ascii=False, indent=2))
    else:
        render.show_check(result, f" --config {config_file}" if config_file else "")
    result.require_good_rows()


def _preflight(settings: Config) -> Preflight:
    """Return what the files' names and heads tell, before a session starts."""
    if settings.source.kind != "files":
        raise ConfigError("source.kind: check looks at files; set source.kind=files and source.mapping=shop.yaml")
    extras.require("spark", "a check")
    from bp_spark.ingest.onboarding.preflight import look_at_files, require_ready

    mapping = require_ready(settings)
    if not re.fullmatch("[A-Z]{3}", settings.cleaning.currency):
        raise ConfigError("cleaning.currency: must be a code of three capital letters, as EUR")
    if mapping is None or settings.source.mapping is None:
        raise ConfigError("source.mapping: must name the YAML file that describes the files")
    found = look_at_files(settings.source.mapping, mapping)
    for warning in found.warnings:
        logger.warning("%s", warning)
    return found


def featurize(
    as_of: Annotated[
        list[str],
        typer.Option(help="Date YYYY-MM-DD to build features for, from events before it; may be repeated."),
    ],
    overrides: Overrides = None,
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild", help="Derive all tables again from the raw tables, as after a change of cleaning rules."
        ),
    ] = False,
    strict: StrictOption = False,
    config_file: ConfigOption = None,
) -> None:
    """Ingest new deliveries, clean them, and build the features of each as-of date.

    Each raw row becomes an event, counts as a duplicate, or goes to quarantine. Only new and changed files are read, and
    only their user-days are aggregated again. The features go to the table user_features.

    A file that can't be read is named in the log, and the next call tries it again.

    Example: bp-spark featurize --as-of 2017-10-03 tables.path=/data/lakehouse
    """
    settings = common.load_settings(config_file, overrides)
    dates = [config.parse_date(text) for text in as_of]
    from bp_spark.ingest.onboarding.preflight import require_ready

    # the imports of the stages and the start of a session take seconds
    require_ready(settings)
    from bp_spark import pipeline

    stages = pipeline.featurize(common.start_session(settings, "featurize"), settings, dates, rebuild, strict)
    render.show(render.stage_table("featurize", stages))


def quarantine(
    action: Annotated[
        QuarantineAction, typer.Argument(help="show: count the rows by source and rule; replay: judge the rows again.")
    ],
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Count the quarantined rows, or judge them again after a change of rules, items or rates.

    A replay moves rows that break no rule any more to events, consultations and campaign_contacts.

    Example: bp-spark quarantine replay cleaning.max_amount=5000000
    """
    settings = common.load_settings(config_file, overrides)
    if action is QuarantineAction.show:
        from bp_spark.cli import queries

        rows = queries.quarantine_by_rule(settings)
        render.show(render.rows_table(["source", "rule", "rows"], rows, title="quarantine"))
        return
    from bp_spark import pipeline

    spark = common.start_session(settings, "quarantine")
    render.show(render.stage_table("quarantine replay", pipeline.replay_quarantine(spark, settings)))


def generate(
    folder: Annotated[
        str, typer.Argument(help="Folder, or address in an object store, to write to; empty, or not there yet.")
    ],
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Make a synthetic platform: files of all five kinds of events, with dirt, and the mapping that reads them.

    Its size and its shares of dirt are the settings of the section synthetic.

    Example: bp-spark generate platform synthetic.users=100000, then bp-spark featurize --as-of 2024-10-01
    source.kind=files source.mapping=platform/source.yaml
    """
    settings = common.load_settings(config_file, overrides)
    from bp_spark.ingest.sources import synthetic

    platform = synthetic.generate(common.start_session(settings, "generate"), settings.synthetic, folder)
    size = f"{settings.synthetic.users:,} users, {settings.synthetic.days} days"
    render.show(render.rows_table(["table", "rows"], sorted(platform.rows.items()), title=f"{folder}: {size}"))
    dirt = [(*table_and_kind, rows) for table_and_kind, rows in sorted(platform.dirt.items())]
    render.show(render.rows_table(["table", "dirt", "rows"], dirt, title="dirt"))
