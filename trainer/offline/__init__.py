"""CTR models on recorded impressions: columns in, probabilities out. Pure; numpy at the seam."""
