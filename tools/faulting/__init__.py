"""Faults on purpose: what is done to runs, how they get over it, and whether the result is the one without them."""
