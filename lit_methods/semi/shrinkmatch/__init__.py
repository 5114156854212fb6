"""ShrinkMatch: uncertain images are learned from, too, in a class space that is shrunk until they are certain (arXiv:2308.06777)."""
