"""Whole matrices with a binary label for each row, for methods whose iteration takes all rows at once."""
