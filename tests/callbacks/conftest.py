"""Fixtures of the callbacks' tests."""

from wandb_log import no_login

__all__ = ["no_login"]
