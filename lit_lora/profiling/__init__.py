"""Measures and reports the memory of a run: meters, kinds, records, charts and advice."""
