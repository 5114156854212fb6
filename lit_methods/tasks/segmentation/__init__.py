"""Segmentation of images: small networks, a LightningModule, measures."""
