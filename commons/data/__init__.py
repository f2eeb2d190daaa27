"""Batches of tokens.

May import: lifecycle.
May not: launch, cli, training, plans, model, distributed, reporting, config, ops, doctor.
"""
