"""A training's state on disk: written beside the training, whole or not at all, and read back under any plan; models
read from and written to HuggingFace's folders.

May import: plans, model, distributed, reporting, config, model_zoo, ops, doctor, data, lifecycle. May not: whatever
trains (training), reads flags (cli) or starts ranks (launch).
"""
