"""CTR models on recorded impressions: columns to probabilities, as numpy arrays."""
