"""What a run is asked to do: every setting with its default and help, and how what was left open is decided.

May import: model_zoo, ops, doctor, data, lifecycle.
May not: launch, cli, training, plans, model, distributed, reporting.
"""
