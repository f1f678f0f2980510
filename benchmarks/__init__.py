"""Benchmarks that compare selfheal with its peers; `python -m benchmarks` runs them. See README.md."""
