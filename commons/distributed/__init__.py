"""The process group, every rank's place, and memory that ranks of one host share.

May import: config, model_zoo, ops, doctor, data, lifecycle.
May not: launch, cli, training, plans, model, reporting.
"""
