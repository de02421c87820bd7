"""Decide whether a new bundle may score, promote it, and enter it into the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path

import pandas as pd

from bp_spark.core.errors import BundleError, OvertakenError, TrackingError
from bp_spark.evaluation import promotion
from bp_spark.evaluation.promotion import Decision
from bp_spark.lakehouse.run import Run
from bp_spark.registry import bundle as bundles
from bp_spark.registry import decisions, publishing
from bp_spark.registry.bundle import Bundle, Promoted
from bp_spark.training.dataset import users_of_test_date
from bp_spark.training.ensemble import Fitted, predict_sample


def promote(
    run: Run,
    bundle: Bundle,
    decide: Callable[[], Decision],
    refit: date | None = None,
    replacing: Promoted | None = None,
) -> Decision:
    """Promote the bundle if it passes the gate; record the decision beside the bundle and in ``runs``.

    Args:
        run: the running job; this is a stage of it.
        bundle: the new bundle.
        decide: the gate.
        refit: date as of which a bundle that passes is fitted again. Then the refitted bundle is promoted, not this one.
        replacing: what was promoted when the bundle was first compared; by default, what is promoted now.

    Returns:
        The decision of the gate.

    Raises:
        OvertakenError: another training has promoted its bundle since.
    """
    with run.stage("promote") as figures:
        replacing = replacing or bundles.promoted(run.config.bundles)
        decision = decide()
        promoted, reason = decision.promoted, decision.reason
        if promoted and refit:
            promoted, reason = False, f"{reason}; to be fitted anew as of {refit} and then promoted"
        if promoted:
            try:
                bundles.promote(run.config.bundles, bundle, replacing)
            except OvertakenError as error:
                decisions.record(run.config.bundles, bundle, promoted=False, reason=str(error))
                raise
        decisions.record(run.config.bundles, bundle, promoted=promoted, reason=reason)
        figures["promoted"], figures["reason"] = promoted, reason
    return decision


def decide(run: Run, fitted: Fitted, complete: bool) -> Decision:
    """Compare with the baselines, then with the promoted bundle, both on the users of the new bundle's test date.

    Args:
        run: the running job.
        fitted: the new bundle's members, stack and predictions.
        complete: whether the horizon from the test date is over.
    """
    incumbent, obstacle = _incumbent(run)
    if not complete:
        reason = (
            f"the {run.config.labels.horizon_days} days from {fitted.test_date} are not over, so nothing can judge it"
        )
        if incumbent is None:
            return Decision(True, f"{reason}; {obstacle}")
        return Decision(False, f"{reason}; {incumbent.folder.name} stays")
    baselines = promotion.against_baselines(fitted.predictions)
    if incumbent is None or not baselines.promoted:
        return Decision(baselines.promoted, f"{baselines.reason}; {obstacle}" if obstacle else baselines.reason)
    try:
        rival = _judged_bundle(run, incumbent)
        rival_predictions = _fused(run, rival, fitted.test_date)
    except BundleError as error:
        return Decision(True, f"{baselines.reason}; {incumbent.folder.name} can't be compared with ({error})")
    name = rival.folder.name
    if rival is not incumbent:
        name = f"{name}, which {incumbent.folder.name} was fitted anew from,"
    comparison = _compare(run, fitted.predictions, rival_predictions, name)
    reason = f"{baselines.reason}; {comparison.reason}{_head_start(rival, fitted.test_date)}"
    return Decision(comparison.promoted, reason)


def decide_refit(run: Run, bundle: Bundle, judged: Fitted, judged_bundle: Bundle, reason: str) -> Decision:
    """Accept a refit unless it is surely worse than the bundle that passed the gate.

    The refit has seen the spend that the first bundle was judged by, so only a fault makes it surely worse there.

    Args:
        run: the running job.
        bundle: the refitted bundle.
        judged: members and predictions of the bundle that passed the gate.
        judged_bundle: the bundle that passed the gate.
        reason: why it passed.
    """
    as_of, test_date = bundle.manifest["lineage"]["test_date"], judged.test_date
    comparison = _compare(run, _fused(run, bundle, test_date), judged.predictions, judged_bundle.folder.name)
    if not comparison.promoted:
        return Decision(False, f"fitted anew as of {as_of}, but {comparison.reason}, whose test date it has seen")
    return Decision(True, f"fitted anew as of {as_of}; as of {test_date}: {reason}")


def _compare(run: Run, new: pd.DataFrame, old: pd.DataFrame, name: str) -> Decision:
    """Compare the expected spend ``fused`` of users with that of another bundle, called ``name``."""
    others = old[["user_key", "fused"]].rename(columns={"fused": "incumbent"})
    both = new.merge(others, on="user_key", how="inner", validate="one_to_one")
    config, seed = run.config.evaluation, run.config.training.seed
    return promotion.against_incumbent(both, name, margin=config.margin, resamples=config.resamples, seed=seed)


def _incumbent(run: Run) -> tuple[Bundle | None, str]:
    """Return the promoted bundle, or ``None`` and why there is none to compare with."""
    if not bundles.is_any_promoted(run.config.bundles):
        return None, "no other bundle is promoted"
    try:
        incumbent = bundles.load_promoted(run.config)
    except BundleError as error:
        return None, f"the promoted bundle can't be used ({error})"
    if incumbent.horizon_days != run.config.labels.horizon_days:
        return None, f"{incumbent.folder.name}, promoted before, predicts {incumbent.horizon_days} days"
    return incumbent, ""


def _judged_bundle(run: Run, incumbent: Bundle) -> Bundle:
    """Return the bundle that the promoted one was refitted from, if it exists still: it hasn't seen its test horizon."""
    judged = incumbent.manifest["lineage"].get("judged")
    if judged is None:
        return incumbent
    try:
        return bundles.load_promoted(run.config, Path(run.config.bundles) / judged["bundle"])
    except BundleError:
        return incumbent


def _fused(run: Run, bundle: Bundle, test_date: date) -> pd.DataFrame:
    """Return ``user_key, label_spend, fused``: real spend after the test date, and the bundle's expected spend.

    Raises:
        BundleError: the bundle needs a column that today's features lack.
    """
    users = users_of_test_date(run, test_date)
    bundle.check_inputs(users.columns)
    predictions = predict_sample(users, list(bundle.members.values()), run.config)
    inputs = bundle.stack.inputs_from(predictions)
    fused = bundle.stack.apply(inputs, test_date)["expected_spend"]
    return predictions[["user_key", "label_spend"]].assign(fused=fused)


def _head_start(incumbent: Bundle, test_date: date) -> str:
    """Return a warning if the promoted bundle learned from spend by which both bundles are judged."""
    trained_until = str(incumbent.manifest["lineage"].get("test_date", ""))
    if trained_until <= test_date.isoformat():
        return ""
    return f"; {incumbent.folder.name} was trained on labels up to {trained_until}, some of which it is judged by here"


def enter_registry(run: Run, bundle: Bundle, history: Sequence[Mapping[str, float]]) -> None:
    """Enter the bundle into the registry, if one is configured.

    Args:
        run: the running job; this is a stage of it.
        bundle: the new bundle.
        history: epochs of the transformer.

    Raises:
        TrackingError: the registry can't be reached; the message names the bundle.
    """
    if run.config.tracking.uri is None:
        return
    with run.stage("publish") as figures:
        try:
            published = publishing.publish(run.config, bundle, history, run.records[0]["started_at"])
        except TrackingError as error:
            raise TrackingError(
                f"{error}; the training is done and the bundle is written: bp-spark publish --bundle {bundle.folder}"
            ) from error
        figures["model"], figures["version"] = run.config.tracking.model, published.version
        figures[run.config.tracking.alias] = published.promoted
