"""What looks after a run: dashboard, resume, guards, progress, cost."""
