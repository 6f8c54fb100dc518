"""What PyTorch does in a function: its operations counted, and those found that wait for a GPU.

On a GPU an operation of these sizes costs about as much to launch as any other, so that their
number is the time. It can be counted on a CPU, where an update dispatches the same operations.
"""

import collections
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Not counted: what the schema calls a view (view, expand, slice, select, split, detach ...), the
# record_function hooks that an optimizer's step calls, and these, which compute nothing either.
HOOKS = "profiler"  # their namespace
NO_WORK = frozenset(
    {
        "_unsafe_view",
        "empty",
        "empty_like",
        "empty_strided",
        "is_same_size",
        "new_empty",
        "new_empty_strided",
    }
)
# Python has to know a number, or a shape, that is on the device.
HOST_SYNCS = frozenset(
    {
        "_local_scalar_dense",  # item(), float(), bool(), if
        "_unique2",
        "bincount",
        "equal",
        "is_nonzero",
        "masked_select",
        "nonzero",
        "normal.Tensor_Tensor",  # looks at the deviations: Normal.sample, unlike rsample
        "normal.float_Tensor",
        "repeat_interleave.Tensor",
        "unique_consecutive",
        "unique_dim",
    }
)


def names_of(operation) -> tuple[str, str, str]:
    """Namespace, name, and name with overload: aten, add and add.Tensor of aten::add.Tensor."""
    namespace, _, full_name = operation.name().partition("::")
    return namespace, full_name.partition(".")[0], full_name


def computes(operation) -> bool:
    """Whether an operation does anything that a GPU would be asked for."""
    namespace, name, _ = names_of(operation)
    return not (namespace == HOOKS or operation.is_view or name in NO_WORK)


class CountOperations(TorchDispatchMode):
    """Within it, counts what is dispatched, by name."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if computes(operation):
            self.counts[names_of(operation)[1]] += 1
        return operation(*args, **(kwargs or {}))


def count_operations(function: Callable[[], object]) -> collections.Counter:
    """Calls a function, and counts its operations by name, those of backward passes included."""
    with CountOperations() as mode:
        function()
    return mode.counts


class HostSyncError(AssertionError):
    """An operation that would make Python wait for a GPU."""


class HostSync(TorchDispatchMode):
    """Within it, HostSyncError for every operation that would make Python wait for a GPU.

    Copies between devices, numpy() and tolist() are not seen: on a CPU they dispatch nothing.
    """

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        _, name, full_name = names_of(operation)
        if name in HOST_SYNCS or full_name in HOST_SYNCS or has_mask(name, args):
            raise HostSyncError(f"{operation.name()} waits for the device")
        return operation(*args, **(kwargs or {}))


def has_mask(name: str, args: tuple) -> bool:
    """Whether rows are picked by a mask: their number is on the device."""
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return False
    picked = [index for index in args[1] if index is not None]
    return any(index.dtype in (torch.bool, torch.uint8) for index in picked)
