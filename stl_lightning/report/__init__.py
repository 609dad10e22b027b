"""Tables of results; reads result files only."""
