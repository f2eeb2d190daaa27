"""What a run reports: step records, FLOPs, summaries, sinks, the console, the environment.

May import: config, model_zoo, ops, doctor, data, lifecycle.
May not: launch, cli, training, plans, model, distributed.
"""
