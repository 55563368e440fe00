"""The batch and its catalog. `from service import Catalog` is how other Python code reads one."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from service.catalog import Catalog

__all__ = ["Catalog"]


def __getattr__(name: str) -> Any:
    """`Catalog` when it is asked for: importing any other module of this package must not load its store."""
    if name == "Catalog":
        from service.catalog import Catalog

        return Catalog
    raise AttributeError(f"module {__name__} has no attribute {name}")
