"""Factorisations of a whole matrix that also serve a prediction: data in rows, one iteration per step."""
