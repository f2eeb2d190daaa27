"""The process group, every rank's place, and memory that ranks of one host share.

May import: config, ops, lifecycle.
May not: reporting, model and every room above.
"""
