"""Everything cftrain raises on purpose.

    TrainError
    ├── ConfigError               a setting that cannot be used (also ValueError)
    │   └── UnknownModelError     no model of this name
    ├── MissingScaleError         a model needs a scale that a slide lacks (also ValueError)
    ├── MissingExtraError         a model needs coordinates, graphs or parents that a slide lacks (also ValueError)
    ├── ShapeError                features, lengths or widths disagree (also ValueError)
    ├── LeakageError              a patient on both sides of a fold
    ├── NonFiniteError            a loss, gradient or prediction is NaN or Inf
    ├── WeightsError              a file of weights that cannot be read, or is no model of ours
    ├── RunError                  a run directory that cannot be written, resumed or read
    │   ├── OtherSettingsError    it was begun with other settings
    │   └── RunBusyError          another process trains in it
    ├── RankError                 a process of several that train together failed; names it
    └── StoppedError              a signal ended the run; its checkpoints are written

Messages name the slide, the setting or the file, what was found, and what to do, in one line.
"""

from __future__ import annotations


class TrainError(Exception):
    """Base of every error that cftrain raises on purpose."""


class ConfigError(TrainError, ValueError):
    """A setting is unknown, of the wrong type, or outside its range."""


class UnknownModelError(ConfigError):
    """There is no model of this name."""


class MissingScaleError(TrainError, ValueError):
    """A model needs patches at a scale where a slide has none."""


class MissingExtraError(TrainError, ValueError):
    """A model needs coordinates, graphs or parents of patches, and a slide or store has none."""


class ShapeError(TrainError, ValueError):
    """Shapes disagree: features against lengths, or against the width the model was built for."""


class LeakageError(TrainError):
    """A patient is in both train and val of one fold."""


class NonFiniteError(TrainError):
    """A loss, a gradient or a prediction is NaN or Inf."""


class WeightsError(TrainError):
    """A file of weights cannot be read, or holds no model that we know."""


class RunError(TrainError):
    """A run directory cannot be written, resumed or read."""


class OtherSettingsError(RunError):
    """A run directory was begun with other settings than those asked for.

    Parameters
    ----------
    keys
        Of the settings that differ.
    """

    def __init__(self, message: str, keys: tuple[str, ...]) -> None:
        super().__init__(message)
        self.keys = keys

    def __reduce__(self) -> tuple[type[OtherSettingsError], tuple[str, tuple[str, ...]]]:
        return type(self), (str(self), self.keys)  # it travels between processes


class RunBusyError(RunError):
    """Another process trains in a run directory, or in the same fold of it."""


class RankError(TrainError):
    """One of several processes that train together failed; the message names its rank, its node and why."""


class StoppedError(TrainError):
    """A signal asked the run to stop: it wrote its checkpoints and can be resumed.

    Parameters
    ----------
    signal_number
        Which signal.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number

    def __reduce__(self) -> tuple[type[StoppedError], tuple[str, int]]:
        return type(self), (str(self), self.signal_number)  # it travels between processes


class MeasureError(TrainError):
    """A model cannot be measured on a slide of this size here; says why."""
