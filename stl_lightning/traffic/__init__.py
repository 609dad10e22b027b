"""What a rank says to others while it trains: the bytes of its process tree, and a guard against process groups."""

from stl_lightning.traffic.count import BYTES, Traffic, total_bytes
from stl_lightning.traffic.guard import forbid_process_groups

__all__ = ["BYTES", "Traffic", "forbid_process_groups", "total_bytes"]
