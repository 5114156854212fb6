"""ConR: a contrastive regulariser for skewed labels."""
