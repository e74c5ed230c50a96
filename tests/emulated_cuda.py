"""An emulated CUDA device: tensors that say cuda:0 and hold their values on the CPU.

It refuses what CUDA refuses: operations on tensors of two devices, and what the Flash Attention kernels do not take. It
counts the points at which the program would wait for the device. Its `varlen_attn` is the one of varlen_reference.

Once `activate` was called, everything in the process runs on it, so tests start a process for it: launch_on_cuda.py.
What autograd asks for in C++ is in emulated_cuda.cpp, and must be loaded before torch is imported.
"""

import collections
import contextlib
import itertools
import traceback
import types
from pathlib import Path

import torch
import varlen_reference
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
NAME, CAPABILITY = "NVIDIA H100 80GB HBM3", (9, 0)

waits = collections.Counter()  # by operation and line of the program
operations = [0]  # on the device, copies to and from it aside
attended = collections.Counter()  # calls of the attention kernel, by dtype

# These read their result's size on the device.
_SIZE_ON_DEVICE = {
    *(aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_consecutive.default),
    *(aten.bincount.default, aten.repeat_interleave.Tensor),
}
# These move indices from the CPU to the device by themselves.
_INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
# These take no scalar of another device, unlike what works element by element.
_NO_SCALARS = {"aten::cat", "aten::stack", "aten::dot", "aten::gather", "aten::_foreach_norm"}


class CudaTensor(torch.Tensor):
    """A tensor that says cuda:0; `values` is on the CPU."""

    __slots__ = ["values"]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values, requires_grad=False):
        assert not isinstance(values, CudaTensor)
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=CUDA,
            requires_grad=requires_grad,
        )
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def tolist(self):
        _wait("tolist")
        return self.values.detach().tolist()

    def untyped_storage(self):
        return self.values.untyped_storage()

    def data_ptr(self):
        return self.values.data_ptr()

    def __repr__(self):
        return f"CudaTensor({self.values!r})"

    def __reduce_ex__(self, protocol):
        return _on_device, (self.values.detach(), self.requires_grad)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            memo[id(self)] = _on_device(self.values.detach().clone(), self.requires_grad)
            if getattr(self, "_is_param", False):
                memo[id(self)]._is_param = True
        return memo[id(self)]


class _EmulatedCuda(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _on_device(values, requires_grad=False):
    return CudaTensor(values).requires_grad_(requires_grad)


def _values(x):
    return x.values if isinstance(x, CudaTensor) else x


def _wrap(x):
    return CudaTensor(x) if isinstance(x, torch.Tensor) and not isinstance(x, CudaTensor) else x


def _wait(what):
    """Count a point at which the program waits for the device."""
    frames = (f"{'/'.join(Path(f.f_code.co_filename).parts[-2:])}:{line}" for f, line in traceback.walk_stack(None))
    ours = ("tests/emulated_cuda.py", "tests/varlen_reference.py", "torch/")
    shown = itertools.islice((frame for frame in frames if not frame.startswith(ours)), 3)
    waits[f"{what} at {' < '.join(shown)}"] += 1


def _run(func, args, kwargs):
    """What an operation gives on tensors of this device and of the CPU."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    here = [x for x in tensors if isinstance(x, CudaTensor)]
    if func.namespace == "torch_attn":
        return _attend(func, args, kwargs)
    if func in (aten._to_copy.default, aten.copy_.default):
        return _copy(func, args, kwargs)
    operations[0] += bool(here) and func is not aten.detach.default
    _refuse_mixed_devices(func, args, tensors)
    if here:
        _count_wait(func, args)
    device = kwargs.get("device")
    to_device = bool(here) if device is None else torch.device(device).type == "cuda"
    changed = {"device": CPU, "pin_memory": False}
    kwargs_here = {name: changed.get(name, value) for name, value in kwargs.items()}
    out = func(*tree_map(_values, args), **tree_map(_values, kwargs_here))
    if not to_device:
        return out
    wrapped = tree_map(_wrap, out)
    try:
        return return_and_correct_aliasing(func, args, kwargs, wrapped)
    except Exception:  # operations whose results it cannot follow
        return wrapped


def _copy(func, args, kwargs):
    """Copies within a device and between both. Only from pinned memory a copy to the device does not wait."""
    if func is aten._to_copy.default:
        source, device = args[0], kwargs.get("device")
        to_device = isinstance(source, CudaTensor) if device is None else torch.device(device).type == "cuda"
        is_waited_for = not (kwargs.get("non_blocking") and getattr(source, "pinned", False))
    else:
        target, source = args[:2]
        to_device = isinstance(target, CudaTensor)
        is_waited_for = not ((len(args) > 2 and args[2]) or kwargs.get("non_blocking")) or not to_device
    from_device = isinstance(source, CudaTensor)
    if from_device and not to_device:
        _wait("copy from the device")
    elif to_device and not from_device and is_waited_for:
        _wait("copy to the device")
    if func is aten.copy_.default:
        func(_values(target), _values(source), *args[2:], **kwargs)
        return target
    kept = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory", "non_blocking")}
    out = func(_values(source), device=CPU, **kept)
    return CudaTensor(out) if to_device else out


def _refuse_mixed_devices(func, args, tensors):
    others = [x for x in tensors if not isinstance(x, CudaTensor)]
    if not others or len(others) == len(tensors) or func.namespace not in ("aten", "prims"):
        return
    name = func._schema.name
    if func in _INDEXING:
        mixed = not isinstance(args[0], CudaTensor)
        if not mixed:
            _wait("copy of indices to the device")
    else:
        mixed = any(x.dim() > 0 for x in others) or name in _NO_SCALARS
    if mixed:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"({name}; {[(type(x).__name__, tuple(x.shape), x.dtype) for x in tensors]})"
        )


def _count_wait(func, args):
    """Count the operations on this device that wait for it."""
    if func is aten._local_scalar_dense.default:
        _wait("item")
    elif func is aten.equal.default or (func in _SIZE_ON_DEVICE):
        _wait(func._schema.name)
    elif func in _INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1]):
        _wait("index with a mask")


def _attend(func, args, kwargs):
    """The attention kernels, with the constraints of Flash Attention."""
    is_forward = func._schema.name == "torch_attn::_varlen_attn"
    grad, tensors = ([], args) if is_forward else (args[:1], [*args[1:4], *args[6:]])
    query, key, value, bounds, _, longest = tensors[:6]
    for x in (*grad, query, key, value):
        _require(isinstance(x, CudaTensor), "tensors on CUDA", x)
        _require(x.dtype in (torch.float16, torch.bfloat16) and x.dtype == query.dtype, "fp16 or bf16", x)
        _require(x.dim() == 3 and x.shape[-1] % 8 == 0 and x.shape[-1] <= 256, "heads of 8 n up to 256", x)
        _require(x.stride(-1) == 1, "a contiguous last dimension", x)
    _require(isinstance(bounds, CudaTensor) and bounds.dtype == torch.int32, "int32 bounds on CUDA", bounds)
    _require(bounds.values[-1] == len(query), "bounds that end with the last token", bounds)
    _require(bounds.values.diff().max() <= longest, "no row longer than max_q", bounds)
    attended[str(query.dtype)] += 1
    run = varlen_reference.forward if is_forward else varlen_reference.backward
    return tree_map(_wrap, run(*tree_map(_values, args), **tree_map(_values, kwargs)))


def _require(is_so, expected, x):
    if not is_so:
        raise RuntimeError(f"FlashAttention takes {expected}; found {type(x).__name__} {tuple(x.shape)} {x.dtype}")


def activate():
    """Let this process have the emulated device."""
    _stand_in_for_torch_cuda()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)
    torch.nn.Module._apply = _keep_parameters(torch.nn.Module._apply)
    torch.inference_mode = lambda mode=True: torch.no_grad() if mode else torch.enable_grad()
    torch.serialization.add_safe_globals([_on_device])
    _EmulatedCuda().__enter__()


def _stand_in_for_torch_cuda():
    """Answers of `torch.cuda` for one GPU."""
    properties = types.SimpleNamespace(name=NAME, major=9, minor=0, total_memory=80 << 30, uuid="a")
    state = torch.zeros(16, dtype=torch.uint8)
    answers = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": NAME,
        "get_device_capability": CAPABILITY,
        "get_device_properties": properties,
        "max_memory_allocated": 1,
        "memory_allocated": 1,
        "memory_reserved": 1,
        "get_rng_state": state,
        "get_rng_state_all": [state],
        "is_current_stream_capturing": False,
        "_is_in_bad_fork": False,
    }
    silent = ("init", "_lazy_init", "set_device", "synchronize", "empty_cache", "ipc_collect", "manual_seed")
    silent += ("manual_seed_all", "set_rng_state", "set_rng_state_all", "reset_peak_memory_stats")
    for module in (torch.cuda, torch.cuda.random):
        for name, value in (answers | dict.fromkeys(silent)).items():
            if module is torch.cuda or hasattr(module, name):
                setattr(module, name, lambda *args, value=value, **kwargs: value)
    torch.cuda.device = lambda device: contextlib.nullcontext()
    accelerator = {"is_available": True, "device_count": 1, "current_device_index": 0, "set_device_index": None}
    for name, value in (accelerator | {"synchronize": None, "current_accelerator": torch.device("cuda")}).items():
        setattr(torch.accelerator, name, lambda *args, value=value, **kwargs: value)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.Tensor.cuda = lambda self, *args, **kwargs: self.to("cuda")
    torch.Tensor.pin_memory = _pinned
    torch.Tensor.is_pinned = lambda self, *args: getattr(self, "pinned", False)


def _pinned(self, *args):
    """A copy of a tensor in pinned memory."""
    if isinstance(self, CudaTensor):
        raise RuntimeError("cannot pin 'torch.cuda.LongTensor', only dense CPU tensors can be pinned")
    copy = self.clone()
    copy.pinned = True
    return copy


def _keep_parameters(apply):
    """Module._apply that keeps tied parameters tied, and parameters that need no move, as where their `data` is set."""
    depth = 0

    def keeping_apply(self, function, recurse=True):
        nonlocal depth
        tied = collections.defaultdict(list)
        for module in self.modules() if depth == 0 else ():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    tied[parameter].append((module, name))
        depth += 1
        try:
            out = apply(self, function, recurse)
        finally:
            depth -= 1
        for before, places in tied.items():
            module, name = places[0]
            after = module._parameters[name]
            if type(before.data) is type(after.data) and before.dtype == after.dtype:
                after = before  # as an optimiser knows it
            for module, name in places:
                module._parameters[name] = after
        return out

    return keeping_apply
