"""Magnetic resonance imaging: multi-coil k-space, coil maps and masks."""
