"""Starts a run and sees it through: the launcher, torchrun's engine, several machines, ranks that hang or fail.

May import: every other room.
May not: be imported by any of them.
"""
