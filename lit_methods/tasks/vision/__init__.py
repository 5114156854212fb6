"""Image classification: the module and the networks that many techniques share."""
