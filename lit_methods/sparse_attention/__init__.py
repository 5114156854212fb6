"""Attention that leaves out what hardly matters."""
