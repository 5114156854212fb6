"""Group bias adaptation."""
