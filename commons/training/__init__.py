"""From a configuration to a stream of step records: session, loop, parity check, traces.

May import: plans and every room below.
May not: launch, cli.
"""
