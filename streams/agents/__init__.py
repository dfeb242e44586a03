"""Faust agents: the item path."""
