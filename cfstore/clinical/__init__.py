"""Clinical tables as people find them: one row per patient, with `time_months` and `event`.

`formats` knows the columns of each kind of table, `files` turns bytes into columns of text,
`cells` reads single values, `collapse` makes one row of a patient's many, `table` puts them together.
"""

from __future__ import annotations

from cfstore.clinical.table import ClinicalTable, looks_clinical, read_clinical

__all__ = ["ClinicalTable", "looks_clinical", "read_clinical"]
