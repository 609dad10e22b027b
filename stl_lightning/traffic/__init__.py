"""What a rank says to others while it trains: the bytes of its process tree, and a guard against process groups."""

from stl_lightning.traffic.count import Traffic
from stl_lightning.traffic.guard import forbid_process_groups

__all__ = ["Traffic", "forbid_process_groups"]
