"""DLoRAL."""
