"""Benchmarks against other libraries (peers): `python -m benchmarks`, or `make bench`."""
