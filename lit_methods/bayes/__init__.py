"""Networks whose weights are normal distributions: layers, conversion of any module, prediction, sparse files. Kit, without Lightning."""
