"""The whole life of a dead letter: published, listed, requeued, dropped."""
