"""GPT-2 as pure functions of tensors, its initial weights, and how it is compiled and captured.

May import: distributed, config, ops and below.
May not: plans and every room above.
"""
