"""Benchmarks that ship: what this machine reaches, measured by the real processes."""
