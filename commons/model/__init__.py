"""GPT-2 as pure functions of tensors, its initial weights, and how it is compiled and captured.

May import: distributed, reporting, config, model_zoo, ops, doctor, data, lifecycle.
May not: launch, cli, training, plans.
"""
