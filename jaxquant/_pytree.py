"""The only class decorator of the project: a frozen dataclass that is a JAX pytree."""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")


def static(**kwargs: Any) -> Any:
    """Declare a field that belongs to the tree's structure: hashable, and a new value retraces."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, static))
def pytree(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass whose non-static fields are leaves or subtrees.

    Nothing is validated on construction: JAX rebuilds the object with tracers, `None` or specs as leaves.
    """
    # jaxtyping would otherwise check leaves in __init__, which breaks jax.tree.map and eval_shape results.
    cls.__no_type_check__ = True  # pyright: ignore[reportAttributeAccessIssue]
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, kw_only=True, eq=False)(cls))
