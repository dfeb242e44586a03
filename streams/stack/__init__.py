"""The embedded stack: Kafka, Valkey and Milvus Lite as child processes."""
