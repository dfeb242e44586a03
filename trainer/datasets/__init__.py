"""Data-set folders: files, exposures, spans."""
