"""top-AFA: how many features a sample gets follows from its norm; and the AFA evaluation of any sparse autoencoder."""
