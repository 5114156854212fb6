"""Indoor scenes: coloured points with sparse labels, and masks of posed depth cameras."""
