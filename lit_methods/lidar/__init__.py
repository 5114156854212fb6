"""LiDAR pretraining and segmentation."""
