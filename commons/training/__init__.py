"""From a configuration to a stream of step records: session, loop, parity check, traces."""
