"""Image classification data sets: digits, CIFAR, ImageNet, each with data that need no download."""
