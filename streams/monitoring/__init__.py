"""Prometheus: imports every report class; no role imports it."""
