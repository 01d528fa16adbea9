"""Modules that are loaded at the first use of one of their attributes.

numba, SciPy, faiss and implicit take between a tenth of a second and a second to load, and most
runs use at most one of them. A file that needs one names it at the top, like an import: `faiss =
later("faiss")`.
"""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, final


@final
class _Later(ModuleType):
    """A placeholder of a module, which loads it when an attribute is read."""

    def __getattr__(self, name: str) -> object:
        return getattr(import_module(self.__name__), name)


def later(name: str) -> Any:
    """Return a placeholder of a module, which loads it when something of it is used.

    Args:
        name: Its full name, such as `scipy.sparse`.
    """
    return _Later(name)


def installed(package: str) -> bool:
    """Return whether a package of an extra can be loaded, without loading it."""
    return find_spec(package) is not None
