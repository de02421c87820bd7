"""Losses of spend prediction, one value for each row.

The caller weighs, sums and divides, so that a mean over ranks is exact. Labels are spend in money; negative labels (more
refunds than purchases) count as no spend.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_MIN_SIGMA = 1e-3
_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


def ziln_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the negative log-likelihood of the zero-inflated lognormal.

    Source: Wang, Liu, Miao: A Deep Probabilistic Model for Customer Lifetime Value Prediction, 2019,
    arXiv:1912.07753.

    Args:
        outputs: [B, 3]: logit of P(spend > 0), mean and raw scale of log spend.
        labels: [B], money.

    Returns:
        float32 [B].
    """
    logit, mu, sigma = ziln_parameters(outputs)
    labels = labels.float()
    positive = labels > 0
    buys = F.binary_cross_entropy_with_logits(logit, positive.float(), reduction="none")
    # Zero labels take log(1): a masked -inf would still give NaN gradients.
    log_label = torch.log(torch.where(positive, labels, torch.ones_like(labels)))
    amount = log_label + torch.log(sigma) + _LOG_SQRT_2PI + 0.5 * ((log_label - mu) / sigma) ** 2
    return buys + positive.float() * amount


def ziln_parameters(outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logit of P(spend > 0), the mean and the standard deviation of log spend, float32 [B] each."""
    logit, mu, raw = outputs.float().unbind(-1)
    return logit, mu, F.softplus(raw) + _MIN_SIGMA


def log_mse_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the squared error of log(1 + spend).

    Args:
        outputs: [B, 1], predicted log(1 + spend).
        labels: [B], money.

    Returns:
        float32 [B].
    """
    return (outputs.float().squeeze(-1) - torch.log1p(labels.float().clamp(min=0))) ** 2


def tweedie_loss(log_mean: Tensor, labels: Tensor, power: float) -> Tensor:
    """Return the negative log-likelihood of a Tweedie distribution, without the terms that the prediction doesn't change.

    With ``power`` between 1 and 2 it is a compound Poisson-gamma: a mass at zero, a density above. The remaining terms are half
    the unit deviance but for a constant.

    Source: Jørgensen, Exponential Dispersion Models, JRSS B 1987; Dunn and Smyth, Statistics and Computing 2005.

    Args:
        log_mean: [B], log of the predicted mean.
        labels: [B], in the unit of the mean.
        power: of the mean in the variance, between 1 and 2 (both excluded).

    Returns:
        float32 [B].
    """
    log_mean, labels = log_mean.float(), labels.float().clamp(min=0)
    low, high = 1 - power, 2 - power
    return torch.exp(high * log_mean) / high - labels * torch.exp(low * log_mean) / low


def band_loss(logits: Tensor, labels: Tensor, edges: Tensor) -> Tensor:
    """Return the cross-entropy of the band that a label falls into.

    Args:
        logits: [B, K].
        labels: [B], money.
        edges: [K - 1], rising: band k holds labels above edge k - 1 and up to edge k.

    Returns:
        float32 [B].
    """
    bands = torch.bucketize(labels.float().clamp(min=0), edges.float())
    return F.cross_entropy(logits.float(), bands, reduction="none")
