"""AdaWAC."""
