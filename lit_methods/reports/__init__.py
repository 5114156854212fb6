"""Reports and dashboards of runs."""
