"""Losses for discrete-time hazards, computed from logits in log space."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  the name PyTorch gives it

from cftrain.errors import ConfigError, ShapeError

Reduction = Literal["mean", "sum", "none"]


def nll_survival(
    logits: Tensor, time_bin: Tensor, event: Tensor, *, alpha: float = 0.0, reduction: Reduction = "mean"
) -> Tensor:
    """Negative log-likelihood of discrete-time hazards, in nats per slide: a float32 scalar, or [B] float32.

    With h = sigmoid(logits) and S_k the running product of (1 - h), S_{-1} = 1, an observed death in bin y
    costs -log(S_{y-1} h_y); a patient censored in bin y costs -(1 - alpha) log S_y. Both are taken as sums of
    log-sigmoids, so the loss and its gradient stay finite where h or S would round to 0.

    Parameters
    ----------
    logits : [B, K] float
        Computed in float32 whatever the dtype; float64 stays float64.
    time_bin : [B] int64, 0…K-1
        Interval of the last follow-up.
    event : [B] bool
        True where death was observed (the opposite of TCGA's `censorship`).
    alpha
        How far censored cases are discounted, 0…1; 0 keeps the full likelihood.
    reduction
        "mean" over the B slides, their "sum", or "none" for one value each.

    Raises
    ------
    ShapeError
        The inputs disagree on B or have another dtype, or a bin is not among 0…K-1. Bins are looked at on the
        CPU only: on another device that would wait for it at every step.
    ConfigError
        `alpha` or `reduction` is none of the above.

    References
    ----------
    Zadeh & Schmid 2020, doi:10.1109/TPAMI.2020.2979450. Equals `nll_loss` of RustinS/CrossFusion except where
    that clamps h or S at 1e-7 (and so passes no gradient).
    """
    _check_options(alpha, reduction)
    _check_batch(logits, time_bin, event)
    x_BK = logits if logits.dtype == torch.float64 else logits.float()
    bins_K = torch.arange(x_BK.shape[1], device=x_BK.device)
    before_BK = bins_K < time_bin[:, None]
    log_survived_B = torch.where(before_BK, F.logsigmoid(-x_BK), 0.0).sum(dim=1)
    x_B = x_BK.gather(1, time_bin[:, None]).squeeze(1)
    log_last_B = F.logsigmoid(torch.where(event, x_B, -x_B))  # log h_y at a death, log(1 - h_y) if censored
    loss_B = -(log_survived_B + log_last_B)
    return _reduce(torch.where(event, loss_B, (1.0 - alpha) * loss_B), reduction)


def _reduce(loss_B: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return loss_B
    return loss_B.mean() if reduction == "mean" else loss_B.sum()


def _check_options(alpha: float, reduction: str) -> None:
    if not 0.0 <= alpha <= 1.0:
        msg = f"alpha is {alpha}: choose 0 (keep all of the censored likelihood) to 1 (none of it)"
        raise ConfigError(msg)
    if reduction not in ("mean", "sum", "none"):
        msg = f"reduction is {reduction!r}: choose 'mean', 'sum' or 'none'"
        raise ConfigError(msg)


def _check_batch(logits: Tensor, time_bin: Tensor, event: Tensor) -> None:
    if logits.ndim != 2 or not logits.numel() or not logits.is_floating_point():
        found = f"{logits.dtype} {tuple(logits.shape)}"
        msg = f"logits are {found}: give floats [B, K], at least one slide and one bin"
        raise ShapeError(msg)
    B, K = logits.shape
    for name, column, dtype in (("time_bin", time_bin, torch.int64), ("event", event, torch.bool)):
        if column.shape != (B,) or column.dtype != dtype:
            found = f"{column.dtype} {tuple(column.shape)}"
            msg = f"{name} is {found}: logits {tuple(logits.shape)} need {dtype} ({B},)"
            raise ShapeError(msg)
    if time_bin.device.type == "cpu" and not ((time_bin >= 0) & (time_bin < K)).all():
        msg = f"time_bin spans {int(time_bin.min())}…{int(time_bin.max())}: logits of {K} bins need 0…{K - 1}"
        raise ShapeError(msg)
