"""Starts a run and sees it through: the launcher, torchrun's engine, several machines, ranks that hang or fail.

May import: cli, training, checkpoint, plans, model, distributed, reporting, config, model_zoo, ops, doctor, data,
lifecycle.
May not: nothing.
"""
