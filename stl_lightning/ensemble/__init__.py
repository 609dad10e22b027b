"""Logits of members in, one calibrated prediction out: weightings, pooling, metrics, and their fit."""
