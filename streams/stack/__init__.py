"""The embedded stack: Apache Kafka, Valkey and Milvus Lite as child processes, on this machine only."""
