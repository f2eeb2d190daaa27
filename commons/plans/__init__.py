"""How model and optimizer are spread over devices: one entry per plan in registry.PLANS.

May import: model, distributed, reporting, config, model_zoo, ops, doctor, data, lifecycle.
May not: launch, cli, training.
"""
