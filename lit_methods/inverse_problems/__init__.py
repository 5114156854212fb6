"""Inverse problems, and bilevel learning of what regularises them."""
