"""Measurements: each a script that writes what it saw with hardware, versions, command and commit."""
