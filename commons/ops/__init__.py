"""Operators of GPT-2: losses, norms, feed-forward layers, fp8, recomputation, and their GPU kernels.

May import: lifecycle.
May not: launch, cli, training, plans, model, distributed, reporting, config, doctor, data.
"""
