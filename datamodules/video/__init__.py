"""Short videos to learn from, and prompts of long ones."""
