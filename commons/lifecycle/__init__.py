"""How a rank lives and ends: its heartbeat, its guard, the ways in which a run can end.

May import: nothing of the suite.
May not: launch, cli, training, plans, model, distributed, reporting, config, ops, doctor, data.
"""
