"""What runs and sweeps found, as one page, a table and a CSV: `python -m benchmarks.report --help`."""
