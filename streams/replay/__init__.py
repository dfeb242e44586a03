"""A data-set folder into Kafka, in event-time order."""
