"""What a run is asked to do: every setting with its default and its help."""
