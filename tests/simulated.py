"""A make-believe GPU: tensors that say cuda:0 and compute on the CPU. Import it in a process of its own: it patches
PyTorch.

It refuses operators whose tensors lie on both devices, counts launches and lists what makes the host wait. An operator
on the device counts as one launch, views and empty tensors as none, and a GRU's pass as one call of cuDNN; on a real
GPU some operators are several kernels. Nothing here knows time, streams, graphs or rounding. Synchronising an event is
no wait, since in a training it belongs to the update before, nor is a copy that was asked not to block.
"""

import types
from collections import Counter

import torch
import torch._dynamo  # before the patches, which it would look through
import torch.nn.modules.rnn
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import clip_grad
from torch.optim import optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

HERE = torch.device("cuda", 0)
STREAM = types.SimpleNamespace(record_event=lambda: types.SimpleNamespace(synchronize=lambda: None))
launches: Counter[str] = Counter()
cudnn: Counter[str] = Counter()
waits: list[str] = []
FREE = (
    "_local_scalar_dense",
    "_unsafe_view",
    "_reshape_alias",
    "lift_fresh",
    "detach",
    "set_",
    "resize_",
)  # beside the views and empty…
LOOKS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "multinomial")


class Simulated(Tensor):
    """A tensor of the device; `host` has its numbers."""

    @staticmethod
    def __new__(cls, host, requires_grad=False):
        place = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype}
        made = Tensor._make_wrapper_subclass(cls, host.size(), device="cpu", requires_grad=requires_grad, **place)
        made.host = host
        return made

    def __init__(self, host, requires_grad=False):
        pass

    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda, is_cpu = (property(lambda self, value=value: value) for value in (HERE, True, False))

    def tolist(self):
        return self.to("cpu").tolist()

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return dispatched(operator, args, kwargs or {})


class Device(TorchDispatchMode):
    """While it is entered, tensors can be made on the device too."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return dispatched(operator, args, kwargs or {})


def reset():
    for record in (launches, cudnn, waits):
        record.clear()


def host(value):
    return value.host if isinstance(value, Simulated) else value


def there(value):
    return Simulated(value) if isinstance(value, Tensor) else value


def is_there(device):
    return device is not None and torch.device(device).type == "cuda"


def dispatched(operator, args, kwargs):
    """Every operator of PyTorch passes here, if it has to do with the device."""
    name, tensors = operator._schema.name.partition("::")[2], [x for x in tree_leaves(args) if isinstance(x, Tensor)]
    on_device, made = [isinstance(tensor, Simulated) for tensor in tensors], is_there(kwargs.get("device"))
    if not made and not any(on_device):
        return operator(*args, **kwargs)
    by_index = name.startswith(("index", "_index", "_unsafe_index"))
    if name in ("copy_", "_to_copy") and not all(on_device):
        waits.extend([] if kwargs.get("non_blocking") or args[2:] == (True,) else [f"{name} between the devices"])
    elif any(tensor.dim() for tensor, own in zip(tensors, on_device, strict=True) if not own):
        if not by_index or not on_device[0] or tensors[-1].is_floating_point():
            raise RuntimeError(f"{name}: tensors on both devices, {[tuple(tensor.shape) for tensor in tensors]}")
        waits.append(f"{name} by a tensor of the CPU")
    if name in LOOKS or (by_index and any(tensor.dtype == torch.bool for tensor in tensors[1:])):
        waits.append(name)
    if not (operator.is_view or name in FREE or "empty" in name):
        launches[name] += 1
    kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
    kwargs |= {"device": "cpu"} if made else {}
    results = operator(*tree_map(host, args), **tree_map(host, kwargs))
    first = operator._schema.arguments[0].alias_info if args and isinstance(args[0], Tensor) else None
    return args[0] if first and first.is_write else tree_map(there, results)


class CudnnGRU(torch.autograd.Function):
    """A GRU's pass over a batch as one call, computed by the CPU's own."""

    @staticmethod
    def forward(context, choices, *tensors):
        if not all(isinstance(tensor, Simulated) and tensor.dtype == tensors[0].dtype for tensor in tensors):
            raise RuntimeError("a GRU's tensors differ in device or type")
        cudnn[f"forward, {tensors[0].dtype}"] += 1
        context.given = [tensor.host.detach().float().requires_grad_() for tensor in tensors]
        with torch.enable_grad():
            context.results = torch._VF.gru(*context.given[:2], context.given[2:], *choices)
        return tuple(Simulated(result.detach().to(tensors[0].dtype)) for result in context.results)

    @staticmethod
    def backward(context, *gradients):
        cudnn["backward"] += 1
        floats = [host(gradient).float() for gradient in gradients]
        found = torch.autograd.grad(context.results, context.given, floats)
        return None, *(Simulated(gradient.to(gradients[0].dtype)) for gradient in found)


def gru(inputs, hidden, weights, *choices):
    own = isinstance(inputs, Simulated)
    return (
        CudnnGRU.apply(choices, inputs, hidden, *weights) if own else torch._VF.gru(inputs, hidden, weights, *choices)
    )


def to(self, *args, _to=Tensor.to, **kwargs):
    """Tensor.to, to and from the device too."""
    first = args[0] if args and isinstance(args[0], (str, torch.device)) else None
    device, blocks = kwargs.get("device", first), not (kwargs.get("non_blocking") or True in args[1:])
    own = isinstance(self, Simulated)
    if device is None or (not own and not is_there(device)):
        return _to(self, *args, **kwargs)
    if own != is_there(device):
        waits.extend(["copy to or from the device"] * blocks)
        self = Simulated(self.detach().clone()) if not own else self.host.detach().clone()
    dtype = kwargs.get("dtype") or next((x for x in args if isinstance(x, torch.dtype)), self.dtype)
    return self if dtype == self.dtype else _to(self, dtype)


def dropout(values, p=0.5, training=True, inplace=False, _dropout=functional.dropout):
    """As CUDA has it: one launch, and one for the gradient."""
    if isinstance(values, Simulated) and training and 0 < p < 1:
        return torch.native_dropout(values, p, True)[0]
    return _dropout(values, p, training, inplace)


def by_device(tensors, *rest, _group=_foreach_utils._group_tensors_by_device_and_dtype):
    return {(tensors[0][0].device, kind[1]): groups for kind, groups in _group(tensors, *rest).items()}


torch.__future__.set_overwrite_module_params_on_conversion(True)
torch.cuda._lazy_init = lambda: None
torch.cuda.current_stream = lambda: STREAM
torch.Generator = lambda device="cpu", _made=torch.Generator: _made()
Tensor.to, Tensor.pin_memory, Tensor.cpu = to, lambda self: self, lambda self: to(self, "cpu")
functional.dropout = dropout
torch.nn.modules.rnn._VF = types.SimpleNamespace(gru=gru)
for module in (_foreach_utils, clip_grad, optimizer):
    module._group_tensors_by_device_and_dtype = by_device
for kinds in (_foreach_utils._foreach_supported_types, optimizer._foreach_supported_types):
    kinds.extend([] if Simulated in kinds else [Simulated])
