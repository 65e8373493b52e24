"""Corpora: from text to packed token rows, and from rows to batches."""

from distiljax.data.config import default_data_config
from distiljax.data.loader import RowLoader, eval_batches
from distiljax.data.metadata import Metadata
from distiljax.data.prepare import prepare
from distiljax.data.sources import documents

__all__ = ["Metadata", "RowLoader", "default_data_config", "documents", "eval_batches", "prepare"]
