"""Kafka and nothing else: clients, topics, one description of the cluster, one bounded reader, records to messages."""
