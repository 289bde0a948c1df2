"""Text in lines of a given width: wrapping, aligning, columns."""

from .columns import columns, table
from .wrap import align, shorten, wrap

__all__ = ["align", "columns", "shorten", "table", "wrap"]
