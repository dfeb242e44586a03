"""Clicks to better weights: window, space-time negatives, CiUBM, metrics. Knows torch; no socket, no clock, no global random state."""
