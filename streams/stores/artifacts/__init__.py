"""Releases, checkpoints and journals, in a folder or an object store."""
