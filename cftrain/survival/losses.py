"""Losses of a survival model: of discrete-time hazards, in log space from logits; of one log hazard, after Cox."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  the name PyTorch gives it

from cftrain.errors import ConfigError, ShapeError

Reduction = Literal["mean", "sum", "none"]
Ties = Literal["efron", "breslow"]


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
    x_BK = _precise(logits)
    x_B = _in_bin(x_BK, time_bin)
    log_last_B = F.logsigmoid(torch.where(event, x_B, -x_B))  # log h_y at a death, log(1 - h_y) if censored
    loss_B = -(_log_survived(x_BK, time_bin) + log_last_B)
    return _reduce(torch.where(event, loss_B, (1.0 - alpha) * loss_B), reduction)


def ce_survival(
    logits: Tensor, time_bin: Tensor, event: Tensor, *, alpha: float = 0.0, reduction: Reduction = "mean"
) -> Tensor:
    """Cross-entropy of being dead or alive at the end of the last bin, in nats per slide: float32, as `nll_survival`.

    An observed death in bin y costs (1 - alpha) [-log(1 - S_y)] + alpha [-log(S_{y-1} h_y)]: it asks for a death by
    the end of y, and with alpha for one in y itself. A patient censored in y costs (1 - alpha) [-log S_y].
    1 - S_y is summed up as the chances of dying in each bin up to y, in log space, so that nothing cancels where
    S_y is near 1: loss and gradient are finite for all finite logits.

    Parameters
    ----------
    logits : [B, K] float
        Computed in float32 whatever the dtype; float64 stays float64.
    time_bin : [B] int64, 0…K-1
        Interval of the last follow-up.
    event : [B] bool
        True where death was observed.
    alpha
        Weight of the second term of deaths, 0…1. At 1 censored slides cost nothing.
    reduction
        "mean" over the B slides, their "sum", or "none" for one value each.

    Raises
    ------
    ShapeError, ConfigError
        As `nll_survival`.

    References
    ----------
    Zadeh & Schmid 2020, doi:10.1109/TPAMI.2020.2979450, who find it biased where the likelihood is not. Equals
    `ce_loss` of RustinS/CrossFusion except where that clamps S_y or h_y at 1e-7 (and so passes no gradient), by the
    1e-7 it adds to S_{y-1}, and where S_y rounds to 1, at which a death costs it inf.
    """
    _check_options(alpha, reduction)
    _check_batch(logits, time_bin, event)
    x_BK = _precise(logits)
    log_survived_B, x_B = _log_survived(x_BK, time_bin), _in_bin(x_BK, time_bin)
    in_time_B = -_log_died(x_BK, time_bin)
    in_bin_B = -(log_survived_B + F.logsigmoid(x_B))
    alive_B = -(log_survived_B + F.logsigmoid(-x_B))
    return _reduce(torch.where(event, (1 - alpha) * in_time_B + alpha * in_bin_B, (1 - alpha) * alive_B), reduction)


def cox_loss(
    log_hazard: Tensor,
    time_months: Tensor,
    event: Tensor,
    *,
    ties: Ties = "efron",
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Negative log partial likelihood of the slides of one optimiser step, in nats: a float32 scalar.

    A death at time t costs log(sum of exp(x) over the slides still at risk at t) - x. Who is at risk is looked for
    among these B slides only, so all of a step must be given at once; a censored slide is at risk up to and
    including its own time. A step without a death has no partial likelihood: its loss is 0, with a gradient of 0.

    Parameters
    ----------
    log_hazard : [B] float
        x, higher = worse; a constant added to all changes nothing. Computed in float32 whatever the dtype; float64
        stays float64.
    time_months : [B] float32 or float64
        Last follow-up. Times are tied where they are equal in their own dtype.
    event : [B] bool
        True where death was observed.
    ties
        Deaths at one time. "breslow": each sees all of them at risk. "efron": of d, the first sees all, the last
        only 1/d of their hazards beside the others', which is closer to a likelihood without ties; lifelines has it.
    reduction
        "mean" over the deaths (not the slides), or their "sum".

    Raises
    ------
    ShapeError
        The inputs are not all [B], B at least 1, or of another dtype, or a time is NaN or infinite. Times are looked
        at on the CPU only.
    ConfigError
        `ties` or `reduction` is none of the above.

    Notes
    -----
    Takes B x B tables, 4 MB for 1,000 slides.

    References
    ----------
    Cox 1972; Efron 1977, doi:10.1080/01621459.1977.10480613; Katzman et al. 2018 (DeepSurv),
    doi:10.1186/s12874-018-0482-1.
    """
    _check_choice("ties", ties, get_args(Ties))
    _check_choice("reduction", reduction, ("mean", "sum"))
    _check_times(log_hazard, time_months, event)
    x_B = _precise(log_hazard)
    log_risk_B = _log_sum(x_B, time_months >= time_months[:, None])
    if ties == "efron":
        log_risk_B = log_risk_B + _efron(x_B, log_risk_B, time_months, event)
    total = torch.where(event, log_risk_B - x_B, 0.0).sum()
    return total / event.sum().clamp(min=1) if reduction == "mean" else total


def _efron(x_B: Tensor, log_risk_B: Tensor, time_months: Tensor, event: Tensor) -> Tensor:
    """log(1 - l / d * T / R) for the l-th of d deaths tied at a time, T their hazards and R those at risk: [B]."""
    itself_BB = torch.eye(len(x_B), dtype=torch.bool, device=x_B.device)  # keeps the rows of censored slides finite
    tied_BB = (time_months == time_months[:, None]) & event & event[:, None] | itself_BB
    share_B = tied_BB.tril(diagonal=-1).sum(dim=1).to(x_B.dtype) / tied_BB.sum(dim=1)
    return torch.log1p(-share_B * (_log_sum(x_B, tied_BB) - log_risk_B).exp())


def _log_sum(x_B: Tensor, chosen_BB: Tensor) -> Tensor:
    """The log of each row's sum of exp(x) over what it chose, at least one each: [B]."""
    return torch.where(chosen_BB, x_B, -torch.inf).logsumexp(dim=1)


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _in_bin(x_BK: Tensor, time_bin: Tensor) -> Tensor:
    return x_BK.gather(1, time_bin[:, None]).squeeze(1)


def _log_survived(x_BK: Tensor, time_bin: Tensor) -> Tensor:
    """log S_{y-1}, of having lived through the bins before y: [B]."""
    bins_K = torch.arange(x_BK.shape[1], device=x_BK.device)
    return torch.where(bins_K < time_bin[:, None], F.logsigmoid(-x_BK), 0.0).sum(dim=1)


def _log_died(x_BK: Tensor, time_bin: Tensor) -> Tensor:
    """log(1 - S_y), 1 - S_y being the sum of h_j S_{j-1} over the bins j up to y: [B]."""
    log_survived_BK = F.pad(F.logsigmoid(-x_BK[:, :-1]).cumsum(dim=1), (1, 0))
    bins_K = torch.arange(x_BK.shape[1], device=x_BK.device)
    log_died_BK = F.logsigmoid(x_BK) + log_survived_BK
    return torch.where(bins_K <= time_bin[:, None], log_died_BK, -torch.inf).logsumexp(dim=1)


def _reduce(loss_B: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return loss_B
    return loss_B.mean() if reduction == "mean" else loss_B.sum()


def _check_options(alpha: float, reduction: str) -> None:
    if not 0.0 <= alpha <= 1.0:
        msg = f"alpha is {alpha}: choose 0 (keep all of the censored likelihood) to 1 (none of it)"
        raise ConfigError(msg)
    _check_choice("reduction", reduction, get_args(Reduction))


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices[:-1])
        msg = f"{name} is {value!r}: choose {listed} or {choices[-1]!r}"
        raise ConfigError(msg)


def _check_batch(logits: Tensor, time_bin: Tensor, event: Tensor) -> None:
    if logits.ndim != 2 or not logits.numel() or not logits.is_floating_point():
        found = f"{logits.dtype} {tuple(logits.shape)}"
        msg = f"logits are {found}: give floats [B, K], at least one slide and one bin"
        raise ShapeError(msg)
    K = logits.shape[1]
    _check_column("time_bin", time_bin, (torch.int64,), "logits", logits)
    _check_column("event", event, (torch.bool,), "logits", logits)
    if time_bin.device.type == "cpu" and not ((time_bin >= 0) & (time_bin < K)).all():
        msg = f"time_bin spans {int(time_bin.min())}…{int(time_bin.max())}: logits of {K} bins need 0…{K - 1}"
        raise ShapeError(msg)


def _check_times(log_hazard: Tensor, time_months: Tensor, event: Tensor) -> None:
    if log_hazard.ndim != 1 or not log_hazard.numel() or not log_hazard.is_floating_point():
        msg = f"log_hazard is {log_hazard.dtype} {tuple(log_hazard.shape)}: give floats [B], at least one slide"
        raise ShapeError(msg)
    _check_column("time_months", time_months, (torch.float32, torch.float64), "log_hazard", log_hazard)
    _check_column("event", event, (torch.bool,), "log_hazard", log_hazard)
    if time_months.device.type == "cpu" and not time_months.isfinite().all():
        at = int((~time_months.isfinite()).nonzero()[0])
        msg = f"time_months is {float(time_months[at])} in row {at}: leave slides without a follow-up out"
        raise ShapeError(msg)


def _check_column(name: str, column: Tensor, dtypes: tuple[torch.dtype, ...], leader: str, led_by: Tensor) -> None:
    """One value of one of `dtypes` for each row of the tensor called `leader`."""
    B = len(led_by)
    if column.shape != (B,) or column.dtype not in dtypes:
        found, wanted = f"{column.dtype} {tuple(column.shape)}", " or ".join(str(dtype) for dtype in dtypes)
        msg = f"{name} is {found}: {leader} {tuple(led_by.shape)} needs {wanted} ({B},)"
        raise ShapeError(msg)
