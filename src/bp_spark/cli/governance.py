"""Commands for users' data: forget users, change the secret of their keys, delete old rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bp_spark.cli import common, render
from bp_spark.cli.common import ConfigOption, Overrides
from bp_spark.core import config


def forget(
    overrides: Overrides = None,
    user: Annotated[list[str] | None, typer.Option(help="The platform's id of a user; may be repeated.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="File of user ids, one a line. Unlike --user it leaves no id in the shell's history."),
    ] = None,
    config_file: ConfigOption = None,
) -> None:
    """Erase users from all tables, older table versions and checkpoints, and prove it.

    At the end the command reads every file and fails if one still holds such a user. From then on, deliveries of
    these users are left out. Models keep what they learned until the next training.

    Other jobs may run meanwhile. A job that read the users before they were erased ends with an error: run that job
    again. If this command is stopped, run it again, too. It ends with code 9 if an id belongs to nobody; the other
    users are erased then.

    Example: bp-spark forget --file gone.txt
    """
    settings = common.load_settings(config_file, overrides)
    ids = list(user or ())
    if file is not None:
        try:
            ids += file.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError):
            raise typer.BadParameter("can't be read as UTF-8 text", param_hint="--file") from None
    if not any(user_id.strip() for user_id in ids):
        raise typer.BadParameter("give --user or --file with at least one id", param_hint="--user")
    from bp_spark import pipeline

    stages = pipeline.forget(common.start_session(settings, "forget"), settings, ids)
    render.show(render.stage_table("forget", stages))


def rotate_keys(
    to: Annotated[str, typer.Option(help="Address of the new secret: env:NAME, file:PATH or databricks:SCOPE/KEY.")],
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Give every user a new key, made with a new secret, and erase the old keys.

    Then set privacy.secret to the new address, featurize and train. Holdout and folds depend on the keys, so they are
    drawn again.

    If another job writes meanwhile, either that job or this command ends with code 7 or 3: run that one again. If
    this command is stopped, run it again, too.

    Example: bp-spark rotate-keys --to file:/etc/bp-spark/secret-2025
    """
    settings = common.load_settings(config_file, overrides)
    # A wrong address must be an error before the first table is rewritten.
    config.load(overrides=[f"privacy.secret={to}"])
    from bp_spark import pipeline

    stages = pipeline.rotate_keys(common.start_session(settings, "rotate-keys"), settings, to)
    render.show(render.stage_table("rotate-keys", stages))
    render.show(f"From now on: privacy.secret={to}. Then featurize and train: holdout and folds are drawn anew.")


def maintain(overrides: Overrides = None, config_file: ConfigOption = None) -> None:
    """Join the small files of all tables, and delete the files that no version of the last week needs.

    No row changes, and other jobs may run meanwhile: a night beside it may end with code 7 or 3, and is run again. Call
    this once a week. Delta's OPTIMIZE and VACUUM do the work; the property delta.deletedFileRetentionDuration of a table
    says how long files of old versions are kept.

    Example: bp-spark maintain tables.path=/data/lakehouse
    """
    settings = common.load_settings(config_file, overrides)
    from bp_spark import pipeline

    stages = pipeline.maintain(common.start_session(settings, "maintain"), settings)
    render.show(render.stage_table("maintain", stages))


def retain(overrides: Overrides = None, config_file: ConfigOption = None) -> None:
    """Delete the rows that are older than privacy.retention_days allows, also from older table versions.

    No other job may run meanwhile.

    Example: bp-spark retain privacy.retention_days.scores=400 privacy.retention_days.events=1100
    """
    settings = common.load_settings(config_file, overrides)
    from bp_spark import pipeline

    stages = pipeline.retain(common.start_session(settings, "retain"), settings)
    render.show(render.stage_table("retain", stages))
