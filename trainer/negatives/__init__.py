"""Space-time negatives: the memory bank and the sampler."""
