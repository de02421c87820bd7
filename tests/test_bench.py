"""The benchmarks run, and what they compare is the same work; how fast it is, no test says."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from bench import Usage, ablation, data, decisions, gpu, house, labelling, sizes, stack, suite, warm_start, worlds
from bench.duckdb_peer import MACROS, dialect
from bp_spark.core import config
from bp_spark.features.aggregates import SEQUENCE_COLUMNS
from bp_spark.features.catalogue import catalogue

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def figures(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    data.main(["--quick", "--folder", str(folder), "--out", str(folder / "data.json")])
    assert [path.name for path in folder.iterdir()] == ["data.json"]
    return json.loads((folder / "data.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.thorough
def test_spark_and_duckdb_do_the_same_work(figures: dict[str, Any]) -> None:
    for full in figures["full"].values():
        assert full["compared"]["equal_cells"] > data.EQUAL_CELLS
        assert full["compared"]["users"] > 50
        assert full["ratio"] == pytest.approx(full["spark_seconds"] / full["duckdb_seconds"])


@pytest.mark.slow
@pytest.mark.thorough
def test_every_row_of_the_dirty_platform_is_accounted_for(figures: dict[str, Any]) -> None:
    dirt = figures["dirt"]
    assert dirt["balanced"]
    assert dirt["rows"] == dirt["events"] + dirt["duplicates"] + dirt["quarantine"]
    assert dirt["share"] == pytest.approx(0.05, abs=0.01)
    assert dirt["latent"]["spearman"] > 0.1


@pytest.mark.slow
@pytest.mark.thorough
def test_the_figures_of_the_nights_are_there(figures: dict[str, Any]) -> None:
    assert figures["growth"]["ratio"] > 0
    (night,) = figures["new_day"].values()
    assert night["events"] > 0
    assert night["ratio"] > 0
    (embedding,) = figures["embedding"].values()
    assert set(embedding) == {"texts", "first_seconds", "second_seconds"}
    assert set(figures["goals"]) == {"full", "new_day"}


def test_the_suite_is_measured_by_part_and_a_part_that_fails_is_no_figure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    took = {"test": 600.0, "check-integrations": 100.0, "test-fast": 90.0}
    monkeypatch.setattr(suite, "run", lambda _, target: (took[target], "=== 9 passed, 1 skipped in 590.00s ==="))
    suite.main(["test", "integrations", "fast"])
    figures = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {one["figure"]: one["value"] for one in figures} == {
        "suite.seconds": 600.0,
        "suite.tests": 9,
        "suite.ci_seconds": 700.0,
        "suite.fast_seconds": 90.0,
    }
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="no such luck"):
        suite.run(sys.executable, "-c", "raise SystemExit('no such luck')")


def test_each_way_of_asking_is_drawn_from_the_same_first_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelling, "ROUNDS", 5)
    monkeypatch.setattr(labelling, "STEP", 20)
    found, rng = catalogue(config.load().features), np.random.default_rng(1)
    pool, test = (pd.DataFrame(rng.exponential(10, (90, len(found.names))), columns=found.names) for _ in range(2))
    pool["label_spend"], test["label_spend"] = pool["spend_90d"] * 2, test["spend_90d"] * 2
    said = labelling.simulate(pool, test, found, per_label=2, seeds=2, most=60)
    curve = pd.DataFrame(said["curve"]).pivot(index="labels", columns="strategy", values="mae")
    assert curve.index.tolist() == [20, 40, 60]
    assert curve.loc[20].nunique() == 1
    assert (curve.loc[60] < curve.loc[20]).all()
    apart = pd.DataFrame(said["less_random"])
    assert set(apart["labels"]) == {40, 60, "all"}
    assert (apart["low"] <= apart["mean"]).all()
    mine = apart.query("labels == 60 and metric == 'mae' and strategy == 'disagreement'")["mean"].item()
    assert mine == pytest.approx(curve.loc[60, "disagreement"] - curve.loc[60, "random"])


@pytest.mark.parametrize(
    ("spark_sql", "value"),
    [
        ("aggregate(array(3, 1, 2), 0L, (s, x) -> s + x)", 6),
        ("aggregate(array(300, 400), 0D, (s, x) -> s + x / 100 * (x / 100))", 25.0),
        ("array_sort(array(3, 1, 2))[1]", 2),
        ("array_max(array(3, 1, 2))", 3),
        ("size(filter(array(3, -1, 2), x -> x > 0))", 2),
        ("try_divide(1, 0)", None),
        ("try_divide(1, 4)", 0.25),
        ("get(array(7, 8), 1)", 8),
        ("get(array(7, 8), 2)", None),
        ("if(2 > 1, 3 * 2.5D, null)", 7.5),
    ],
)
def test_the_catalogues_sql_means_the_same_in_duckdb(spark_sql: str, value: float | None) -> None:
    connection = duckdb.connect()
    connection.execute(MACROS)
    assert connection.execute(f"SELECT {dialect(spark_sql)}").fetchone() == (value,)


def _features(**changes: Any) -> pa.Table:
    settings = config.load()
    columns: dict[str, Any] = {"user_key": ["b", "a"]}
    columns |= {feature.name: pa.array([1.0, None], pa.float32()) for feature in catalogue(settings.features).features}
    columns |= {c.name: pa.array([[1, 2], []], pa.list_(pa.int64())) for c in SEQUENCE_COLUMNS}
    return pa.table(columns | changes)


def test_equal_features_pass_in_any_order_of_users() -> None:
    compared = data.compare(_features(), _features().take([1, 0]), config.load())
    assert compared["equal_cells"] == 1
    assert compared["users"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user_key": ["b", "c"]}, "not of the same ones"),
        ({"recency_days": pa.array([1.1, None], pa.float32())}, "recency_days"),
        ({"recency_days": pa.array([1.0, 0.0], pa.float32())}, "recency_days"),
        ({"seq_kind": pa.array([[1, 3], []], pa.list_(pa.int64()))}, "seq_kind"),
        ({"seq_kind": pa.array([[1], [2]], pa.list_(pa.int64()))}, "seq_kind"),
    ],
)
def test_features_that_differ_fail_loudly(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(data.BenchError, match=message):
        data.compare(_features(), _features(**changes), config.load())


def test_what_a_process_used_is_counted_though_it_ended_and_nobody_asked_for_its_end() -> None:
    # as Spark's daemon of workers does; 0.6 s of processor time each
    burn = "import time\nwhile time.process_time() < 0.6: pass"
    daemon = f"""
import signal, subprocess, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for _ in range(2):
    subprocess.Popen([sys.executable, "-c", {burn!r}]).wait()
"""
    with Usage() as used:
        subprocess.run([sys.executable, "-c", daemon], check=True)
    assert 0.8 < used.cpu_seconds < 10
    assert 1e6 < used.worker_peak < 1e9


def test_the_documented_sizes_are_those_of_the_networks() -> None:
    lines = (ROOT / "docs/sizes.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    documented = {row[0].strip("`"): row[1:8] for row in cells}
    found = {}
    for name, network in sizes.networks(config.load()):
        of, trained = network.config, sum(p.numel() for p in network.parameters() if p.requires_grad)
        numbers = [of.hidden_size, of.layers, of.heads, of.intermediate_size, of.adapter_size]
        if of.backbone == "text":
            numbers[1:4] = ["–"] * 3
        found[name] = [str(number) for number in numbers] + [f"{network.parameter_count:,}", f"{trained:,}"]
    assert documented == found


def test_a_size_has_a_cost() -> None:
    name, network = next(sizes.networks(config.load(overrides=["features.history_length=4"])))
    figures = sizes.measure(network, users=2, repeats=1)
    assert name == "tiny"
    assert min(figures["training_ms_per_row"], figures["forward_ms_per_user"]) > 0
    assert figures["trained"] == figures["parameters"] == network.parameter_count


def test_each_part_is_left_out_of_the_same_predictions() -> None:
    rng = np.random.default_rng(3)

    def said(users: int, noise: float) -> pd.DataFrame:
        spend = rng.gamma(2, 50, users) * (rng.random(users) < 0.8)
        names = ("linear", "btyd", "trees", "sqrt_trees", "transformer")
        rows = {name: spend * rng.lognormal(0, noise * (1 + n), users) + 1 for n, name in enumerate(names)}
        keys = {"user_key": [f"u{n}" for n in range(users)], "as_of_date": date(2024, 1, 1), "seen": True}
        return pd.DataFrame({**keys, "label_spend": spend, **rows})

    full = ablation.Said(said(600, 0.1), said(300, 0.1))
    exact = full.test.assign(transformer=full.test["label_spend"])
    told = full.out_of_fold.assign(transformer=full.out_of_fold["label_spend"])
    # in another order, as another fit may bring them
    better = full.with_transformer(ablation.Said(told.iloc[::-1], exact.iloc[::-1]))
    settings = config.load(overrides=["evaluation.resamples=20"])
    made = ablation.variants(full, {"transformer that knows": better}, settings.fusion)
    judged = {each["variant"]: each for each in ablation.judged(made, full.test, settings)}
    assert set(judged) == set(made)
    assert "default_less_variant" not in judged[ablation.FULL]
    knows = judged["fused, transformer that knows"]
    assert knows["figures"]["mae"]["value"] < judged[ablation.FULL]["figures"]["mae"]["value"]
    assert knows["default_less_variant"]["mae"]["low"] > 0
    alone = judged["btyd alone, as it says"]["figures"]["mae"]["value"]
    assert alone == pytest.approx((full.test["btyd"] - full.test["label_spend"]).abs().mean())


def test_the_processor_learns_and_scores_what_a_gpu_is_compared_to(tmp_path: Path) -> None:
    figures = gpu.run(300, 2, ["tiny"], ["cpu"], tmp_path)["sizes"]["tiny"]
    assert figures["training"]["cpu"]["rows_per_second"] > 0
    assert figures["scoring"]["cpu"]["users_per_second"] > 0


def test_worlds_are_what_their_names_say() -> None:
    made = {name: worlds.orders(worlds.WORLDS[name], seed=1) for name in worlds.WORLDS}
    for name, rows in made.items():
        before = rows[rows["at"] < str(worlds.TEST_DATE)]
        assert before["user"].nunique() == worlds.USERS
        assert (before["at"].min().date() - worlds.TEST_DATE).days >= -7 * worlds.WORLDS[name].weeks
        assert (rows["paid"] > 0).all()
    assert made["equal_amounts"]["paid"].nunique() == 1
    once = made["one_time_buyers"].groupby("user").size() == 1
    assert once.mean() > 0.5 > (made["plain"].groupby("user").size() == 1).mean()
    by_month = (
        made["season_3_years"]
        .groupby([made["season_3_years"]["at"].dt.year, made["season_3_years"]["at"].dt.month])
        .size()
    )
    assert by_month[2022, 11] > 1.5 * by_month[2022, 6]
    assert by_month[2023, 11] > 1.5 * by_month[2023, 6]


def test_the_figures_of_worlds_are_of_all_of_them() -> None:
    figures = dict.fromkeys(
        ("decile_mape", "rank_loss", "mae_ratio_to_best_peer", "total_error_steady", "p_active_error", "totals_inside"),
        0.0,
    )
    of = {
        "one": figures | {"total_error": -0.3, "coverage": 0.8, "above_high": 0.09, "platform_inside": 0.0},
        "two": figures | {"total_error": 0.1, "coverage": 0.9, "above_high": 0.05, "platform_inside": 1.0},
    }
    found = worlds.summary(of)
    assert (found["total_error_worst"], found["coverage_min"], found["coverage_max"]) == (0.3, 0.8, 0.9)
    assert found["total_error_median"] == pytest.approx(0.2)
    assert (found["above_high_max"], found["platform_coverage"]) == (0.09, 0.5)


def test_a_warm_start_is_better_where_it_ranks_better_and_errs_less() -> None:
    rng = np.random.default_rng(1)
    spend = rng.gamma(1, 50, 300)
    told = {"cold": spend * rng.lognormal(0, 1, 300), "warm": spend * rng.lognormal(0, 0.2, 300)}
    users = pd.DataFrame({"user_key": [f"u{n}" for n in range(300)], "label_spend": spend, "seen": True})
    said = {}
    for name, values in told.items():
        columns = dict.fromkeys(warm_start.MEMBERS, values)
        said[name] = users.assign(**columns, low=0.0, high=np.median(spend))
        said[name].attrs.update(rows=300, seconds=1.0, weights=(1.0,))
    found = warm_start.compared(said, config.load(overrides=["evaluation.resamples=20"]))
    assert found["warm"]["coverage"] == 0.5
    for member in warm_start.MEMBERS:
        assert found[member]["spearman_gain"]["low"] > 0 > found[member]["mae_gain"]["high"]


@pytest.mark.parametrize(("test", "told"), [("assert True", True), ("assert False", False), ("pytest.skip()", False)])
def test_a_stack_agrees_only_where_its_tests_ran_and_passed(tmp_path: Path, test: str, told: bool) -> None:
    (tmp_path / "test_it.py").write_text(f"import pytest\n\ndef test_it():\n    {test}\n")
    assert stack.passes(str(tmp_path / "test_it.py"), "not integration") is told


def test_circles_of_imports_are_counted_once_each() -> None:
    assert house.cycles({"a": ["b"], "b": ["c"], "c": []}) == 0
    assert house.cycles({"a": ["b"], "b": ["a"], "c": ["a", "d"], "d": ["c"]}) == 2


def test_no_package_imports_in_a_circle_and_each_setting_is_described_once() -> None:
    figures = house.measure()
    assert figures["import_cycles"] == 0
    assert figures["settings_with_one_description"] == figures["settings"] > 170
    assert figures["source_lines"] > 10 * figures["largest_module_lines"]


def test_splits_without_a_treatment_seldom_alarm_and_a_covariate_saves_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "EXPERIMENTS", 100)
    rng = np.random.default_rng(5)
    expected = rng.lognormal(3.0, 0.7, 300)
    found = decisions.aa_tests([f"u{n}" for n in range(300)], expected, expected * rng.gamma(4.0, 0.25, 300))
    assert found["false_alarms"] < 0.15
    assert found["effect_covered"] > 0.85
    assert 0.3 < found["users_saved"] < 0.9
    apart = decisions.aa_tests([f"u{n}" for n in range(300)], expected, rng.lognormal(3.0, 0.7, 300))
    assert apart["users_saved"] < 0.1
