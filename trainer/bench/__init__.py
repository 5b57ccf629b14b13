"""Measurements: the record format, what `coatnet bench` times, what a profile shows."""
