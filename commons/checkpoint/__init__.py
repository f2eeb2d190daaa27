"""Models on disk: read from and written to HuggingFace's folders.

May import: plans, model, distributed, reporting, config, model_zoo, ops, doctor, data, lifecycle.
May not: launch, cli, training.
"""
