"""Stores: each file holds a protocol, its real body and an in-memory one."""
