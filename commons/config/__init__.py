"""What a run is asked to do: every setting with its default and help, and how what was left open is decided.

May import: model_zoo, lifecycle.
May not: every room above.
"""
