"""The example DAGs in a real Airflow: `make check-airflow`, in an environment of its own, by unittest.

Airflow's packages don't go with the pins of this project, so that the suite itself can't import it.
"""

from __future__ import annotations

import os
import tempfile
import unittest
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

HOME = tempfile.TemporaryDirectory(prefix="airflow-")
os.environ["AIRFLOW_HOME"] = HOME.name
os.environ["AIRFLOW__LOGGING__LOGGING_LEVEL"] = "ERROR"

from airflow.dag_processing.dagbag import DagBag
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from airflow.serialization.serialized_objects import DagSerialization
from airflow.timetables.base import TimeRestriction

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "conf/airflow"


class NightlyDagTest(unittest.TestCase):
    dags: ClassVar[dict[str, Any]]

    @classmethod
    def setUpClass(cls) -> None:
        bag = DagBag(FOLDER)
        assert not bag.import_errors, bag.import_errors
        cls.dags = dict(bag.dags)

    def ends(self, code: int) -> None:
        stage = self.dags["bp_spark_nightly"].get_task("night").prepare_for_execution()
        stage.bash_command = f"exit {code}"
        stage.execute({})

    def test_airflow_takes_all_dags_and_can_store_them(self) -> None:
        self.assertEqual(set(self.dags), {"bp_spark_nightly", "bp_spark_weekly", "bp_spark_maintenance"})
        for dag in self.dags.values():
            stored = DagSerialization.from_dict(DagSerialization.to_dict(dag))
            self.assertEqual(set(stored.task_dict), set(dag.task_dict))
            self.assertEqual(stored.max_active_runs, 1)

    def test_a_run_is_as_of_the_end_of_its_interval_whenever_it_runs(self) -> None:
        stored = DagSerialization.from_dict(DagSerialization.to_dict(self.dags["bp_spark_nightly"]))
        restriction = TimeRestriction(datetime(2024, 10, 1, tzinfo=UTC), None, catchup=True)
        run = stored.timetable.next_dagrun_info_v2(last_dagrun_info=None, restriction=restriction)
        context = {"data_interval_end": run.data_interval.end}
        stage = self.dags["bp_spark_nightly"].get_task("night").prepare_for_execution()
        command = stage.render_template(stage.bash_command, context)
        self.assertRegex(command, r"^exec \S+spark-submit .*/jobs/night\.py .*--date 2024-10-02$")

    def test_every_command_is_a_job_of_this_project(self) -> None:
        for dag in self.dags.values():
            for task in dag.tasks:
                self.assertTrue((ROOT / "jobs" / f"{task.task_id}.py").is_file())

    def test_what_a_second_try_cannot_mend_fails_at_once(self) -> None:
        for code in (2, 3, 4):
            with self.assertRaises(AirflowFailException):
                self.ends(code)

    def test_other_failures_are_tried_again(self) -> None:
        for code in (1, 5, 6, 7, 99, 137):
            with self.assertRaises(AirflowException) as raised:
                self.ends(code)
            self.assertNotIsInstance(raised.exception, AirflowFailException)
        self.assertEqual({task.retries for dag in self.dags.values() for task in dag.tasks}, {3})

    def test_a_job_that_is_done_is_a_success(self) -> None:
        self.ends(0)


if __name__ == "__main__":
    unittest.main()
