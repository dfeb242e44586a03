"""Stores, in three rooms that do not import each other: vectors, histories, artifacts."""
