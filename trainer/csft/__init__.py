"""Encoder training: pairs, one step, a run, health of the space."""
