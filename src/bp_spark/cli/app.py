"""The ``bp-spark`` command and the jobs: arguments in, one call of the pipeline, a summary out.

Results go to standard output, progress and errors to standard error, as lines of text or JSON. A command ends with 0
when it is done, with the ``exit_code`` of its error (see :mod:`bp_spark.core.errors`), with 2 after wrong usage, with
1 after any other error.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, NoReturn

import typer

from bp_spark.cli import data, effects, experiments, governance, look, model, nights, render
from bp_spark.core import disk, extras, logs
from bp_spark.core.errors import BpSparkError
from bp_spark.core.logs import LogFormat
from bp_spark.core.version import __version__

COMMANDS: tuple[Callable[..., None], ...] = (
    data.init,
    data.check,
    data.featurize,
    model.train,
    model.backtest,
    model.search,
    nights.night,
    nights.score,
    model.select_labels,
    model.add_labels,
    nights.profile,
    nights.recommend,
    nights.drift,
    nights.fairness,
    nights.report,
    effects.campaign_effect,
    look.explain_run,
    look.explain_score,
    look.reproduce,
    model.publish,
    data.quarantine,
    governance.forget,
    governance.rotate_keys,
    governance.retain,
    governance.maintain,
    model.adapt_language,
    data.generate,
    look.features,
    look.dbt_sources,
    look.sql,
    nights.demo,
    look.doctor,
    look.settings,
)
"""Every command, in the order of ``bp-spark --help``."""

logger = logging.getLogger(__name__)

app = typer.Typer(
    name="bp-spark",
    help="Purchasing power of every user, every night, on Apache Spark.",
    epilog="Own data: bp-spark init FOLDER --orders 'exports/*.csv', then check, featurize, train, score. All of it on real "
    "data: bp-spark demo.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command_function in COMMANDS:
    # a pattern without quotes is many words; init says so
    app.command(context_settings={"allow_extra_args": command_function is data.init})(command_function)
app.add_typer(experiments.app)


def _show_version(asked: bool) -> None:
    if asked:
        render.show(__version__)
        raise typer.Exit


@app.callback()
def common_options(
    log_format: Annotated[
        LogFormat,
        typer.Option(
            envvar="BP_SPARK_LOG_FORMAT",
            help="Format of the lines on standard error; jobs take it from the environment.",
        ),
    ] = LogFormat.text,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Choose the format of log lines, before the command starts."""
    logs.listen(log_format)


def main(command: str | None = None, arguments: Sequence[str] | None = None) -> None:
    """Run ``bp-spark``, or the job of a command, and end the process with its exit code.

    An error that a user can mend is one message on standard error. Any other error keeps its traceback.

    Args:
        command: Name of the command; without one, the first argument names it.
        arguments: Words of the command line; by default those of this process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        # typer ends the process itself, also after a usage error.
        try:
            app([command, *words] if command else words, prog_name="bp-spark")
        finally:
            disk.flush_output()
    except SystemExit as end:
        # Databricks takes any SystemExit of a task for a failure.
        if end.code:
            raise
    except ModuleNotFoundError as error:
        _fail(extras.explain(error) or error)
    except Exception as error:
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    """Log the error and end the process with its exit code."""
    error = disk.translated(error) or error
    code = error.exit_code if isinstance(error, BpSparkError) else 1
    fields = {"error": type(error).__name__, "exit_code": code}
    if isinstance(error, BpSparkError):
        logger.error("%s", error, extra={"fields": fields})
    else:
        logger.error("unexpected, see the traceback", exc_info=_without_values(error), extra={"fields": fields})
    sys.exit(code)


def _without_values(error: Exception) -> Exception:
    """Return an error without the words of Spark, which may quote a row; of its analysis, which sees no row, they stay."""
    from pyspark.errors import AnalysisException

    from bp_spark.core.spark_errors import SPARK_ERRORS
    from bp_spark.lakehouse.run import describe_error

    if isinstance(error, AnalysisException) or not isinstance(error, SPARK_ERRORS):
        return error
    return RuntimeError(describe_error(error)).with_traceback(error.__traceback__)
