"""Memory of a run: what is measured, kinds, records and charts."""
