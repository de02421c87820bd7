"""The fine-tuned network as a member of a bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bp_spark.features.labels import horizon_column
from bp_spark.model.columns import Columns
from bp_spark.model.inputs import HISTORY_COLUMNS, read
from bp_spark.model.network import SpendNetwork

BATCH_EVENTS = 8192
"""Events of one forward pass: the activations of more fall out of a core's cache, those of fewer don't fill it."""
GPU_BATCH_EVENTS = 262_144


class TransformerMember:
    """The fine-tuned network as a member of a bundle.

    Args:
        network: a trained network.
        batch_events: events of one forward pass at most, padding and user tokens included; for a network that reads histories
            as text, tokens.
    """

    name = "transformer"

    def __init__(self, network: SpendNetwork, batch_events: int = BATCH_EVENTS) -> None:
        self.network = network.eval()
        self.batch_events = batch_events

    @property
    def features(self) -> tuple[str, ...]:
        """Tabular features that it reads."""
        return self.network.spec.tabular

    @property
    def history(self) -> tuple[str, ...]:
        """Columns of the history that it reads."""
        return HISTORY_COLUMNS

    def predict(self, columns: Columns) -> np.ndarray:
        """Return the expected spend, money, float64 [B].

        Users pass through the network ordered by length of history, which saves padding. They come back in their own order.

        Raises:
            DataError: ``columns`` lacks one that the network reads.
        """
        return self._predict_each(columns, self.network.to_money)

    def predict_horizons(self, columns: Columns) -> dict[str, np.ndarray]:
        """Return the expected spend over each horizon; see :class:`bp_spark.model.members.base.HorizonsMember`.

        Raises:
            DataError: ``columns`` lacks one that the network reads.
        """
        names = [self.name, *(horizon_column(self.name, days) for days in self.network.other_horizons)]
        return dict(zip(names, self._predict_each(columns, self.network.to_money_of_each).T, strict=True))

    def p_active(self, columns: Columns) -> np.ndarray | None:
        """Return the network's P(spend > 0), float64 [B]; ``None`` if its loss has no such part.

        Raises:
            DataError: ``columns`` lacks one that the network reads.
        """
        if self.network.config.loss != "ziln":
            return None
        return self._predict_each(columns, self.network.p_active)

    def _predict_each(self, columns: Columns, transform: Callable[[Tensor], Tensor]) -> np.ndarray:
        """Return the transformed outputs of the network for each user, float64 [B, ...]."""
        network = self.network
        users = read(columns, network.spec, network.vocabulary_ids.cpu().numpy())
        outputs = torch.empty(len(users), network.width, device=network.vocabulary_ids.device)
        with torch.inference_mode():
            for rows in self._batches(network.history.widths(users.lengths)):
                outputs[rows] = network(users.batch(rows).to(outputs.device))
            return transform(outputs).double().cpu().numpy()

    def set_threads(self, threads: int) -> None:
        """Use that many threads of this process in torch from now on."""
        torch.set_num_threads(threads)

    def move_to(self, device: str) -> None:
        """Compute on a device from now on, as ``cuda:0``; a GPU takes more events at once."""
        self.network.to(device)
        self.batch_events = GPU_BATCH_EVENTS if device.startswith("cuda") else BATCH_EVENTS

    def save(self, folder: Path) -> None:
        """Write the network; see :meth:`bp_spark.model.network.SpendNetwork.save`."""
        self.network.save(folder)

    @classmethod
    def load(cls, folder: Path) -> TransformerMember:
        """Read the network; see :meth:`bp_spark.model.network.SpendNetwork.load`."""
        return cls(SpendNetwork.load(folder))

    def _batches(self, widths: np.ndarray) -> Iterator[np.ndarray]:
        """Yield positions of users of like width, as many as make a full batch.

        Args:
            widths: tokens of each user's history, int64 [B].
        """
        order = np.argsort(widths, kind="stable")
        start = 0
        while start < len(order):
            # The widest user of a batch is its last, and a batch has at least one user.
            padded = widths[order[start:]] * np.arange(1, len(order) - start + 1)
            end = start + max(1, int(np.searchsorted(padded, self.batch_events, side="right")))
            yield order[start:end]
            start = end
