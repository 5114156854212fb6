"""SimMatchV2: semi-supervised learning by the consistency of a graph of views (arXiv:2308.06692)."""
