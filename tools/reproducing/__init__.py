"""The published table and its controls, trained over several seeds; see `tools/reproduce`."""
