"""Where a run's records go: one file per sink, and the table of them in registry.py.

Sinks run on rank 0 only and outside the clocks of a step. The training loop knows none of them, and they know
no model: they take StepRecords, a RunHeader and the summary's dict.
"""
