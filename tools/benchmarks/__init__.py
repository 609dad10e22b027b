"""What `tools/bench` measures: one file per subject in `subjects`, and what they share beside it."""
