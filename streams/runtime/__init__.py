"""What any process needs and no domain knows: retries, life cycle, child processes, logs, progress."""
