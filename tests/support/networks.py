"""A small network with random weights and fitted statistics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from bp_spark.core.config import NetworkConfig
from bp_spark.model.history import HistoryEncoder
from bp_spark.model.network import (
    LabelStatistics,
    SpendNetwork,
    Statistics,
)
from tests.support.training_rows import SPEC, TEXT_IDS

TINY = NetworkConfig(
    hidden_size=16, layers=2, heads=2, intermediate_size=16, adapter_size=8, loss="ziln", horizons_weight=0.1
)


def assert_equal_weights(one: Path, other: Path, tolerance: float) -> None:
    """Two files of weights hold the same tensors."""
    found, expected = load_file(one), load_file(other)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance, msg=name)


def make_network(
    config: NetworkConfig = TINY, missing: float = 0.1, max_label: float = 500.0, others: tuple[int, ...] = ()
) -> SpendNetwork:
    torch.manual_seed(0)
    history = HistoryEncoder(config, SPEC.history_length, torch.randn(len(TEXT_IDS), 6))
    network = SpendNetwork(SPEC, config, torch.from_numpy(TEXT_IDS), history, others)
    features = len(SPEC.tabular)
    network.fit_statistics(
        Statistics(
            mean=np.full(features, 2.0),
            std=np.full(features, 3.0),
            missing=np.full(features, missing),
            labels=tuple(
                LabelStatistics(
                    active_share=0.8,
                    log_mean=3.0,
                    log_std=1.0,
                    log1p_mean=2.5,
                    mean_label=40.0 * days / 90,
                    max_label=max_label * days / 90,
                )
                for days in (90, *network.other_horizons)
            ),
            band_edges=np.linspace(10, 90, config.bands - 1),
        )
    )
    return network.eval()
