"""A few images a class, of base and of new classes, with words for both."""
