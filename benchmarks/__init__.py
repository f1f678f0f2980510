"""Measurements of selfheal beside its peers; `python -m benchmarks` runs them. See README.md."""
