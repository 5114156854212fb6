"""CoNo: long videos from a model of short ones, without training (arXiv:2406.05082)."""
