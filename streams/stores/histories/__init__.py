"""Per-user histories, in Redis."""
