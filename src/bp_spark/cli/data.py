"""Commands for data engineers: bring data in, look into quarantine, make a synthetic platform."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from bp_spark.cli import common, render
from bp_spark.cli.common import ConfigOption, Overrides
from bp_spark.core import config


class QuarantineAction(StrEnum):
    """What can be done with quarantined rows."""

    show = "show"
    replay = "replay"


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
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Refuse all new files if one can't be read; by default that one is left out."),
    ] = False,
    config_file: ConfigOption = None,
) -> None:
    """Ingest new deliveries, clean them, and build the features of each as-of date.

    Each raw row becomes an event, counts as a duplicate, or goes to quarantine. Only new deliveries are read. Only
    the user-days that they touch are aggregated again. The features go to the table user_features.

    A file that can't be read is named in the log, and the next call tries it again.

    Example: bp-spark featurize --as-of 2017-10-03 tables.path=/data/lakehouse
    """
    settings = common.load_settings(config_file, overrides)
    dates = [config.parse_date(text) for text in as_of]
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

    A replay moves the rows that now pass to events, consultations and campaign_contacts.

    Example: bp-spark quarantine replay cleaning.max_amount=5000000
    """
    settings = common.load_settings(config_file, overrides)
    from bp_spark import pipeline

    spark = common.start_session(settings, "quarantine")
    if action is QuarantineAction.replay:
        render.show(render.stage_table("quarantine replay", pipeline.replay_quarantine(spark, settings)))
    else:
        rows = pipeline.quarantine_by_rule(spark, settings)
        render.show(render.rows_table(["source", "rule", "rows"], rows, title="quarantine"))


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
