"""From words to a configuration, with everything that is wrong with it told at once.

May import: training, checkpoint, plans, model, distributed, reporting, config, model_zoo, ops, doctor, data, lifecycle.
May not: launch.
"""
