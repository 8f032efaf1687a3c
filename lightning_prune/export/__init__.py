"""Export: files that run elsewhere."""

from lightning_prune.export.exporting import BATCH_SIZES, FORMATS, export, random_inputs

__all__ = ["BATCH_SIZES", "FORMATS", "export", "random_inputs"]
