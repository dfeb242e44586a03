"""The shell: the only package that knows Kafka, Milvus, Redis, HTTP, the environment and the time."""
