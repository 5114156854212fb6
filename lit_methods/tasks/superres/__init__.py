"""Super-resolution: the module, networks and metrics that techniques for it share."""
