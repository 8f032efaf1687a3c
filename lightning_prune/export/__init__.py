"""Export of models to files that run elsewhere."""

from lightning_prune.export.entry import BATCH_SIZES, FORMATS, export
from lightning_prune.export.inputs import random_inputs

__all__ = ["BATCH_SIZES", "FORMATS", "export", "random_inputs"]
