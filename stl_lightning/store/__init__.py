"""The slice store: every slice of a data set written once to a file of its own; a rank reads one of B."""

from stl_lightning.store.encoding import DTYPES
from stl_lightning.store.manifest import Manifest, SliceFacts
from stl_lightning.store.reader import Store, StoredSlice, open_store, verify
from stl_lightning.store.writer import prepare_store

__all__ = ["DTYPES", "Manifest", "SliceFacts", "Store", "StoredSlice", "open_store", "prepare_store", "verify"]
