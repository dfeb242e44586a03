"""aiokafka consumers: the click log, read in batches with explicit offsets."""
