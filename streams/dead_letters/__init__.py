"""The whole life of a dead letter: written, listed, requeued, dropped."""
