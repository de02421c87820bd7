"""Stages of a run as events of OpenLineage (https://openlineage.io): what each read, wrote, and how it ended.

A catalogue such as Marquez, DataHub or OpenMetadata draws the lineage of tables from them. The client of the standard sends
them to where its own variables (``OPENLINEAGE_URL``, ``OPENLINEAGE_API_KEY``) or its file ``openlineage.yml`` say. No event
has a row of a table, or a setting.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from bp_spark.core.config import TablesConfig
from bp_spark.core.stores import folder_of, without_hadoop_names
from bp_spark.core.version import __version__
from bp_spark.lakehouse.tables import SHARED_TABLES

if TYPE_CHECKING:
    from openlineage.client.event_v2 import InputDataset, OutputDataset, RunEvent
    from openlineage.client.facet_v2 import OutputDatasetFacet

NAMESPACE = "bp-spark"
"""Namespace of jobs, and of tables that a metastore manages."""
PRODUCER = f"https://pypi.org/project/bp-spark/{__version__}"

logger = logging.getLogger(__name__)


def send(records: Sequence[Mapping[str, Any]], tables: TablesConfig) -> None:
    """Send the stages of a run. A catalogue that can't be reached is a warning: the tables are written all the same.

    Args:
        records: Rows of RUNS of one run.
        tables: Where tables are.
    """
    from openlineage.client import OpenLineageClient

    try:
        client = OpenLineageClient()
        for event in events(records, tables):
            client.emit(event)
        client.close()
    # whatever its transports raise
    except Exception as error:
        logger.warning("openlineage: events can't be sent (%s)", type(error).__name__)


def events(records: Sequence[Mapping[str, Any]], tables: TablesConfig) -> Iterator[RunEvent]:
    """Yield two events of each stage: that it started, and that it completed or failed.

    A stage is the job ``JOB.STAGE``. Its parent is the run of the job.
    """
    from openlineage.client.event_v2 import Job, Run, RunEvent, RunState
    from openlineage.client.facet_v2 import error_message_run, job_type_job, parent_run

    for number, record in enumerate(records):
        run_id = record["run_id"]
        parent = parent_run.ParentRunFacet(
            run=parent_run.Run(runId=_uuid(run_id)), job=parent_run.Job(namespace=NAMESPACE, name=record["job"])
        )
        job = Job(
            namespace=NAMESPACE,
            name=f"{record['job']}.{record['stage'].replace(' ', '_')}",
            facets={"jobType": job_type_job.JobTypeJobFacet("BATCH", "SPARK", "JOB")},
        )
        facets: dict[str, Any] = {"parent": parent}
        if record["error"] is not None:
            facets["errorMessage"] = error_message_run.ErrorMessageRunFacet(record["error"], "PYTHON")
        run = Run(runId=_uuid(f"{run_id}/{number}"), facets=facets)
        inputs = [_input(name, version, tables) for name, version in record["read"].items()]
        outputs = [_output(name, version, record, tables) for name, version in record["written"].items()]
        started, ended = record["started_at"], record["started_at"] + timedelta(seconds=record["seconds"])
        outcome = RunState.FAIL if record["status"] == "failed" else RunState.COMPLETE
        for state, moment in ((RunState.START, started), (outcome, ended)):
            yield RunEvent(
                eventType=state,
                eventTime=moment.isoformat(),
                run=run,
                job=job,
                inputs=inputs,
                outputs=outputs,
                producer=PRODUCER,
            )


def _uuid(text: str) -> str:
    # the same again for a run that is sent twice
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"bp-spark/{text}"))


def name_of(table: str, tables: TablesConfig) -> tuple[str, str]:
    """Return namespace and name of a table, as OpenLineage spells them for its place.

    >>> name_of("scores", TablesConfig(path="s3a://lake/shop")), name_of("scores", TablesConfig(path=None))
    (('s3://lake', 'shop/bp/scores'), ('bp-spark', 'bp.scores'))
    """
    if tables.path is None:
        return NAMESPACE, f"{tables.namespace}.{table}"
    folder = without_hadoop_names(folder_of(tables.path, tables.namespace))
    parts = urlsplit(folder)
    if not parts.scheme:
        return "file", f"{folder}/{table}"
    return f"{parts.scheme}://{parts.netloc}", f"{parts.path.strip('/')}/{table}"


def _input(name: str, version: int, tables: TablesConfig) -> InputDataset:
    from openlineage.client.event_v2 import InputDataset

    namespace, full_name = name_of(name, tables)
    return InputDataset(namespace=namespace, name=full_name, facets=_facets(name, version))


def _output(name: str, version: int, record: Mapping[str, Any], tables: TablesConfig) -> OutputDataset:
    from openlineage.client.event_v2 import OutputDataset
    from openlineage.client.facet_v2 import output_statistics_output_dataset as statistics

    namespace, full_name = name_of(name, tables)
    rows: dict[str, OutputDatasetFacet] = {}
    # of several tables, the stage counts the rows of one
    if len(record["written"]) == 1 and record["rows_out"] is not None:
        rows["outputStatistics"] = statistics.OutputStatisticsOutputDatasetFacet(rowCount=record["rows_out"])
    return OutputDataset(namespace=namespace, name=full_name, facets=_facets(name, version), outputFacets=rows)


def _facets(name: str, version: int) -> dict[str, Any]:
    from openlineage.client.facet_v2 import dataset_version_dataset, schema_dataset

    facets: dict[str, Any] = {"version": dataset_version_dataset.DatasetVersionDatasetFacet(str(version))}
    declared = {table.name: table for table in SHARED_TABLES}.get(name)
    if declared is not None:
        fields = [
            schema_dataset.SchemaDatasetFacetFields(name=column.name, type=column.type, description=column.comment)
            for column in declared.stored_columns
        ]
        facets["schema"] = schema_dataset.SchemaDatasetFacet(fields=fields)
    return facets
