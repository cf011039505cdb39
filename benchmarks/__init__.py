"""Benchmarks are commands, not tests: each prints its figures from one run."""
