"""From words to a configuration, with everything that is wrong with it told at once.

May import: plans (their table), distributed, config, ops, doctor, lifecycle.
May not: launch, training.
"""
