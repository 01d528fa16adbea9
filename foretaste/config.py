"""The parent of all settings: frozen, and refusing what it does not know."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Settings that come from outside.

    The docstring under a field becomes its help on the command line and in the documentation.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )
