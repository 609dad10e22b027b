"""What training sends over a network, measured between network namespaces; see `tools/network`."""
