"""Driving data sets: nuScenes, KITTI-style and the embedded procedural world."""
