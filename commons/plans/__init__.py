"""How model and optimizer are spread over devices: one entry a plan in registry.PLANS."""
