"""Where a model looks, and what moves its risk: exact maps of every patch, on the slide.

subject.py reads the slide and says which folds may speak of it, places.py says where its patches lie, explain.py makes
the maps (attribution.py and deletion.py are the second opinion), layers.py is what they are. tables.py, geojson.py,
tiff.py, picture.py and viewer.py write them down, folder.py all at once; slide_image.py is the slide's own image.
running.py does all of this in order, overview.py puts a run's heatmaps on one page.
"""

from __future__ import annotations

from cftrain.heatmap.running import (
    FinishedHeatmap,
    FinishedHeatmaps,
    HeatmapOptions,
    HeatmapWatcher,
    explain_slides,
    heatmap_run,
)
from cftrain.heatmap.subject import Source

__all__ = [
    "FinishedHeatmap",
    "FinishedHeatmaps",
    "HeatmapOptions",
    "HeatmapWatcher",
    "Source",
    "explain_slides",
    "heatmap_run",
]
