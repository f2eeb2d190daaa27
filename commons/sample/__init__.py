"""Text from a trained model: the command ``python -m commons.sample``.

May import: cli, training, planner, checkpoint, plans, model, distributed, reporting, config, model_zoo, ops, doctor,
data, lifecycle.
May not: launch.
"""
