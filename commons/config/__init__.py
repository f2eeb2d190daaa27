"""What a run is asked to do: every setting with its default and help, and what "auto" stands for.

May import: model_zoo, lifecycle.
May not: every room above.
"""
