"""How model and optimizer are spread over devices: one entry per plan in registry.PLANS.

May import: model and every room below.
May not: launch, cli, training.
"""
