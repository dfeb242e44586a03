"""`mimstream serve`: the HTTP API, the vector cache and the hot swap of models."""
