"""Everything that leans on the insides of Colossal-AI, one file per topic.

The rest of the suite sees the builders in boosted.py and hybrid.py. They call :func:`runtime.prepare` first, which
imports Colossal-AI and mends its faults.
"""
