"""Epochs as TensorBoard events, beside metrics.jsonl. Needs the package tensorboard (`pip install tensorboard`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from cftrain.errors import ConfigError
from cftrain.results import Epoch

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError as error:
    raise ConfigError("--tensorboard needs its package: pip install 'crossfusion-store[tensorboard]'") from error

OnEpoch = Callable[[int, int, Epoch], None]


def events(outs: Sequence[Path], then: OnEpoch) -> OnEpoch:
    """A listener that writes each epoch's numbers into `fold_<k>/` of its run, and passes them on."""
    writers: dict[tuple[int, int], SummaryWriter] = {}

    def on_epoch(run: int, fold: int, epoch: Epoch) -> None:
        if (run, fold) not in writers:
            writers[run, fold] = SummaryWriter(str(outs[run] / f"fold_{fold}"))
        for name, value in asdict(epoch).items():
            if isinstance(value, float):
                writers[run, fold].add_scalar(name, value, epoch.epoch)
        writers[run, fold].flush()
        then(run, fold, epoch)

    return on_epoch
