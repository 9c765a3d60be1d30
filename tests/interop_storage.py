"""Memory that torch tensors hold, found by walking references and not by asking the object under test."""

import gc

import torch


def reachable(thing) -> int:
    """Sum the bytes of the distinct storages of every tensor that can be reached from an object."""
    seen, storages, todo = {id(thing)}, {}, [thing]
    while todo:
        current = todo.pop()
        if isinstance(current, torch.Tensor):
            parts = getattr(current, "__tensor_flatten__", None)  # a tensor made of tensors has no memory of its own
            if parts is not None:
                todo += [getattr(current, name) for name in parts()[0]]
                continue
            storage = current.untyped_storage()
            if storage.nbytes():
                storages[storage.data_ptr()] = storage.nbytes()
        for other in gc.get_referents(current):
            inside = not isinstance(other, type) and not callable(other) and type(other).__name__ != "module"
            if id(other) not in seen and (inside or isinstance(other, torch.Tensor)):
                seen.add(id(other))
                todo.append(other)
    return sum(storages.values())
