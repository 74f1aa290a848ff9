"""Benchmarks of elastic-timer against its peers: ``python -m tests.benchmarks``."""
