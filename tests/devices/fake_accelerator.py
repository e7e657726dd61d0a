"""An accelerator that is not there: its tensors compute on the CPU, and are watched.

Values are real, and so are gradients and shapes that depend on data. What would fail on a GPU
raises here (operands on two devices), and what would make the host wait for the device is counted.
Copies that do not block are free: what a driver does with pageable memory is not seen, nor is what
fused kernels of a real device do. Setting it up changes torch for good: use a process of its own.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "fakegpu"
DEVICE_NUMBER = 0
aten = torch.ops.aten

_READS_VALUES = (
    aten._local_scalar_dense,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten.bincount,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.unique_dim_consecutive,
)
"""Whose result or shape the host must know."""
_BY_INDEX = (aten.index, aten.index_put, aten.index_put_, aten._unsafe_index_put)
_HALF = ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "scaled_dot_product_attention")
_SINGLE = ("softmax.int", "log_softmax.int", "layer_norm", "mse_loss", "cumsum", "norm.Scalar")
"""What CUDA's autocast computes in half precision, and what in single; of its lists what we use."""


class WrongDeviceError(AssertionError):
    """One operation was given tensors of two devices."""


class FakeTensor(Tensor):
    """A tensor whose numbers lie in `on_host`."""

    on_host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, on_host: Tensor) -> FakeTensor:
        """Wrap a CPU tensor, whose strides it has."""
        made: FakeTensor = Tensor._make_wrapper_subclass(
            cls,
            on_host.shape,
            strides=on_host.stride(),
            storage_offset=on_host.storage_offset(),
            dtype=on_host.dtype,
            device=torch.device(NAME, DEVICE_NUMBER),
        )
        made.on_host = on_host
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Show the numbers without a wait."""
        return f"{NAME} {self.on_host!r}"

    def tolist(self) -> Any:
        """Copy to the host first, as torch does for devices of its own."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse what nobody watches."""
        raise AssertionError(f"{func} on {NAME} outside an `accelerator` block")


class Watch(TorchDispatchMode):
    """Runs operations of fake tensors, and counts the waits of the host by place."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def taken(self) -> Counter[str]:
        """Give the waits since the last call."""
        taken, self.waits = self.waits, Counter()
        return taken

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation on the tensors' values."""
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        fakes = [one for one in tensors if isinstance(one, FakeTensor)]
        target = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        gives_fakes = bool(fakes) if target is None else target.type == NAME
        if gives_fakes or fakes:
            self._check(func, tensors, fakes)
            if _waits(func, args, kwargs, fakes, gives_fakes):
                self.waits[f"{_place()} {func.overloadpacket.__name__}"] += 1
        if target is not None and target.type == NAME:
            kwargs["device"] = torch.device("cpu")
        found = func(*tree_map(_on_host, args), **tree_map(_on_host, kwargs))
        if not gives_fakes:
            return found
        # What an operation changed in place, or was told to write into, stays the same object.
        known = {id(one.on_host): one for one in fakes}

        def wrapped(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            same = known.get(id(leaf))
            if same is not None and same.shape != leaf.shape:
                raise NotImplementedError(f"{func} changes a shape in place; {NAME} cannot")
            return FakeTensor(leaf) if same is None else same

        return tree_map(wrapped, found)

    def _check(self, func: Any, tensors: list[Tensor], fakes: list[FakeTensor]) -> None:
        if func.overloadpacket in (aten.copy_, aten._to_copy):
            return
        strange = [one for one in tensors if not isinstance(one, FakeTensor)]
        if fakes and func.overloadpacket in _BY_INDEX:
            strange = [one for one in strange if one.dtype not in (torch.int64, torch.int32)]
        # A scalar is handed to a kernel by value.
        by_value = torch.Tag.pointwise in func.tags or func.overloadpacket in (
            aten.masked_fill,
            aten.masked_fill_,
            aten.fill_,
            aten.index_put_,
        )
        if by_value:
            strange = [one for one in strange if one.dim()]
        if fakes and strange:
            raise WrongDeviceError(
                f"{func} of {len(fakes)} tensors on {NAME} and {len(strange)} on the CPU, of "
                f"shapes {[tuple(one.shape) for one in strange]}, at {_place()}"
            )


@contextmanager
def accelerator() -> Iterator[Watch]:
    """Have operations on `fakegpu` run, in this thread and in backwards that it starts."""
    # What `torch.tensor` makes becomes visible before it is copied to a device.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        # One thread, whose settings are those of this block.
        with torch.autograd.set_multithreading_enabled(False), Watch() as watch:
            yield watch
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


def set_up() -> torch.device:
    """Tell torch of the accelerator and of its autocast, once in a process, and name it."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
    # As on devices of torch's own, weights that are tied stay so when a model is moved.
    torch.__future__.set_swap_module_params_on_conversion(True)
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    library = torch.library.Library("aten", "IMPL")
    for names, dtype in ((_HALF, torch.bfloat16), (_SINGLE, torch.float32)):
        for name in names:
            library.impl(name, _casting(name, dtype), "AutocastPrivateUse1")
    _LIBRARIES.extend([others, library])
    return torch.device(NAME, DEVICE_NUMBER)


_LIBRARIES: list[torch.library.Library] = []
"""What is registered lasts as long as these."""


class _Module(backend_registration._DummyBackendModule):
    """What torch asks of `torch.fakegpu`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def _casting(name: str, dtype: torch.dtype) -> Callable[..., Any]:
    packet_name, _, overload = name.partition(".")
    operation = getattr(getattr(aten, packet_name), overload or "default")

    def cast(leaf: Any) -> Any:
        is_float = isinstance(leaf, FakeTensor) and leaf.is_floating_point()
        return leaf.to(dtype) if is_float and leaf.dtype is not torch.float64 else leaf

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(NAME, enabled=False):
            return operation(*tree_map(cast, args), **tree_map(cast, kwargs))

    return kernel


def _on_host(leaf: Any) -> Any:
    return leaf.on_host if isinstance(leaf, FakeTensor) else leaf


def _waits(
    func: Any, args: Any, kwargs: dict[str, Any], fakes: list[FakeTensor], gives_fakes: bool
) -> bool:
    packet = func.overloadpacket
    if packet is aten._to_copy:
        return bool(fakes) != gives_fakes and not kwargs.get("non_blocking", False)
    if packet is aten.copy_:
        own, other = (isinstance(one, FakeTensor) for one in args[:2])
        return own != other and not (len(args) > 2 and args[2])
    if packet in _BY_INDEX:
        return any(
            isinstance(one, Tensor)
            and (not isinstance(one, FakeTensor) or one.dtype in (torch.bool, torch.uint8))
            for one in args[1]
        )
    if packet is aten.repeat_interleave:
        return kwargs.get("output_size") is None
    return bool(fakes) and packet in _READS_VALUES


def _place() -> str:
    """Name the innermost line that is not torch's."""
    frames = [
        frame
        for frame in traceback.extract_stack()[:-2]
        if "/torch/" not in frame.filename and "/devices/fake_accelerator" not in frame.filename
    ]
    last = frames[-1]
    return f"{'/'.join(last.filename.split('/')[-2:])}:{last.lineno}"
