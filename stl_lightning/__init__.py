"""Spectral tensor networks: branches trained apart on the slices of a transformed image, summed at the end."""
