"""From a configuration to a stream of step records: session, loop, parity check, traces.

May import: plans, model, distributed, reporting, config, model_zoo, ops, doctor, data, lifecycle.
May not: launch, cli.
"""
