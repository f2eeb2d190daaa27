"""What a run will take before it is started: memory by kind on device and host, and what fits instead.

May import: plans, model, distributed, reporting, config, model_zoo, ops, doctor, data, lifecycle.
May not: launch, cli, training.
"""
