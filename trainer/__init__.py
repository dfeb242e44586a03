"""Clicks to better weights: window, space-time negatives, CiUBM, metrics. No socket, no clock, no global randomness."""
