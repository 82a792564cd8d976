"""A trained run applied to other slides: external validation, or risks for slides without labels.

trained.py reads the run, slides.py finds what it is applied to and refuses what it must not be, ensemble.py computes
the predictions of all folds and puts them together, measures.py holds them against labels where there are any,
writing.py writes them, running.py does all of this in order.
"""

from __future__ import annotations

from cftrain.prediction.running import FinishedPrediction, PredictionWatcher, predict_run
from cftrain.prediction.slides import Target
from cftrain.prediction.trained import Weights

__all__ = ["FinishedPrediction", "PredictionWatcher", "Target", "Weights", "predict_run"]
