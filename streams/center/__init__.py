"""The representation center as a whole: compare with the topic, repair."""
