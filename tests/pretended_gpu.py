"""A GPU that is not there: tensors that say they are on it, and are refused wherever a real one would refuse them.

What they hold is calculated on the CPU, so answers are the CPU's. What mixes the two devices raises, as it does with CUDA; what
takes a tensor's memory for the CPU's does too. Streams, pinned memory and the order of things are not pretended.

Importing this gives torch a further device for good: not for a process that tests anything else.
"""

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class Backend(_DummyBackendModule):
    """What torch asks a kind of device."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("gpu", Backend())
GPU = torch.device("gpu", 0)
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten._index_put_impl_.default)


class Held(torch.Tensor):
    """A tensor on the GPU."""

    @staticmethod
    def __new__(cls, held):
        assert not isinstance(held, Held)
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=GPU
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func}: outside of `pretended_gpu`")

    def item(self):
        return self.held.item()

    def tolist(self):
        return self.held.tolist()

    def __float__(self):
        return float(self.held)

    def __int__(self):
        return int(self.held)

    def __index__(self):
        return int(self.held)

    def __bool__(self):
        return bool(self.held)

    def numpy(self, *, force=False):
        raise TypeError("can't convert gpu:0 device type tensor to numpy")


class Pretence(TorchDispatchMode):
    """Where every operation is looked at."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        flat, _ = tree_flatten((args, kwargs))
        there = [x for x in flat if isinstance(x, Held)]
        here = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, Held) and x.dim()]
        wanted = kwargs.get("device")
        if there and here and func not in MOVES and not (func in INDEXED and isinstance(args[0], Held)):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found gpu:0 and cpu")
        if wanted is not None:
            kwargs["device"] = "cpu"
        given = {id(x.held): x for x in there}
        args, kwargs = tree_map_only(Held, lambda x: x.held, (args, kwargs))
        answer = func(*args, **kwargs)
        if func is torch.ops.aten.copy_.default:
            return given.get(id(answer), answer)
        if torch.device(wanted).type == "gpu" if wanted is not None else there:
            self.operations += 1
            return tree_map_only(torch.Tensor, lambda x: given.get(id(x)) if id(x) in given else Held(x), answer)
        return answer


class Generator(torch.Generator):
    """Of whatever device, it draws what the CPU's does."""

    def __new__(cls, device=None):
        return super().__new__(cls)


@contextmanager
def pretended_gpu():
    """While inside, `GPU` can be used; yields what counts its operations."""
    with ExitStack() as stack:
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` makes them there, and moves them where all can see it
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(mock.patch("torch.Generator", Generator))
        yield stack.enter_context(Pretence())


def brought_home(tensor):
    """What a tensor of the GPU holds, as an array."""
    return tensor.held.numpy()
