"""The vectors of items, in Milvus."""
