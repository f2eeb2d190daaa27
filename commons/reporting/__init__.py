"""What a run tells: step records, FLOPs, summaries, sinks, the console, the environment."""
