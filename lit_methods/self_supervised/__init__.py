"""Pre-training without labels: joint-embedding predictive architectures, and how their features are judged."""
