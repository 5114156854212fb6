"""Searches over the keys of a run: the file that declares one, the study that chooses, the processes that train."""
