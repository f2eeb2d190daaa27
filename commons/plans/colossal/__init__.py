"""Everything that leans on the insides of Colossal-AI, one file per topic.

The rest of the suite sees one function, :func:`commons.plans.colossal.runtime.prepare`, and the classes it hands out.
"""
