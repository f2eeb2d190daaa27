"""What a run reports: step records, FLOPs, summaries, sinks, the console, the environment.

May import: config, model_zoo, lifecycle.
May not: distributed, training and every room above.
"""
