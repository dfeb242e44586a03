"""Process infrastructure without domain logic: retries, life cycle, child processes, logs, progress."""
