"""What data and methods must agree on about superpixels."""

from typing import Any


def agree_on_superpixels(trainer: Any, num_superpixels: int, owner: str) -> None:
    """Raise if the datamodule of a trainer allows ids that its method has no place for.

    Args:
        trainer: Its datamodule may have ``num_superpixels``; without one nothing is compared.
        num_superpixels: Of the method.
        owner: Name of the method's class, for the message.

    Raises:
        ValueError: The data's number is larger: their ids would be those of other samples, or point behind the end.
    """
    data = getattr(trainer, "datamodule", None)
    theirs = getattr(data, "num_superpixels", None)
    if isinstance(theirs, int) and theirs > num_superpixels:
        raise ValueError(
            f"num_superpixels is {num_superpixels} of {owner} and {theirs} of {type(data).__name__}: give both the same number, "
            "17 for class ids and 150 for SLIC"
        )


__all__ = ["agree_on_superpixels"]
