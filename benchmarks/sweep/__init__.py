"""Runs many configurations one after another, each in a process of its own: `python -m benchmarks.sweep --help`."""
