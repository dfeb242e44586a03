"""Prometheus: knows every report class; no role imports it."""
