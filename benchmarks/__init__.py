"""Benchmarks: the tables behind every claim of speed and memory (README.md says how to run them)."""
