"""Batches of tokens.

May import: lifecycle.
May not: every other room.
"""
