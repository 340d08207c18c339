"""How a matrix product is computed: one place for any shape, stride, precision and processor.

Two backends: `torch`, PyTorch's own linear layers (MKL on x86), the default; and `onednn`, its AVX-512 kernels called
directly, on processors where they make whole steps of training at least 15 % faster. Which one a processor has stands
in a table; nothing is timed where a run trains, and a run keeps the backend that it began with.

Operands reach a product dense: contiguous, or the transpose of what is. Columns of a wider tensor are copied first,
which costs microseconds; oneDNN has no fast path for such strides and takes up to twenty times as long
(docs/results/speed.md).
"""

import contextlib
import csv
import dataclasses
import io
import math
from collections.abc import Callable, Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor
from torch.nn import functional as F

from aepo.config import Activation, Precision
from aepo.console import warn
from aepo.errors import ConfigError
from aepo.files import read_text, write_atomically

ARITHMETIC = 2
"""Version of the bits of a training step; every change to them raises it, and what another began is not continued."""
Backend = Literal["torch", "onednn"]
MIN_GAIN = 1.15
"""Whole steps must be so many times as fast by `onednn` as by `torch` for it to be used."""
MIN_ROWS, MIN_PRODUCTS = 16, 2**20
"""Fewer rows, or fewer multiplications in all, do not repay a call of oneDNN, nor rounding to bfloat16."""
BLOCK_ROWS = 512
"""Rows that go through a network at once on a CPU, so that what lies between its layers stays in the processor's cache.

At 256 units 4,096 rows take 1.5 times as long in one piece (docs/decisions/speed.md). GPUs take all rows at once.
"""
MATMUL_PRECISION: dict[Precision, str] = {"float32": "highest", "tf32": "high", "bfloat16": "medium"}
"""Precision -> torch's name of it."""

_backend: Backend = "torch"
_small_differ = False
"""True while small products are to be more precise than `matmul_precision` has the others."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One row of a table of processors: how much faster than `torch` whole steps are by `onednn`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    vendor: str
    """The name in /proc/cpuinfo: GenuineIntel, AuthenticAMD."""
    family: str
    model: str
    """Number of the model in /proc/cpuinfo; empty = every model of the family."""
    torch: str
    """Version of torch, major and minor: 2.13."""
    gain: float
    """Median over stages and shapes of the benchmark; above MIN_GAIN `onednn` is used."""
    source: str
    """Where and when it was measured."""

    @property
    def key(self) -> tuple[str, str, str]:
        """Vendor, family and model."""
        return self.vendor, self.family, self.model

    def is_of(self, processor: "Processor") -> bool:
        """Return whether the row is of this processor and of this process's torch."""
        same = (self.vendor, self.family) == (processor.vendor, processor.family)
        return bool(processor.vendor) and same and self.model in ("", processor.model) and self.torch == torch_version()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Processor:
    """What the kernel tells of the processor; empty strings where it tells nothing."""

    vendor: str
    family: str
    model: str
    name: str


@cache
def processor() -> Processor:
    """Return this machine's processor."""
    facts: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    wanted = {"vendor": "vendor_id", "family": "cpu family", "model": "model", "name": "model name"}
    return Processor(**{name: facts.get(key, "") for name, key in wanted.items()})


def torch_version() -> str:
    """Return torch's version as the tables have it, major and minor."""
    return ".".join(torch.__version__.split(".")[:2])


def read_table(text: str) -> list[Measured]:
    """Return the rows of a table of processors.

    Raises:
        ConfigError: for a line that is no row.
    """
    columns = [field.name for field in dataclasses.fields(Measured)]
    reader = csv.DictReader(text.splitlines(), strict=True)
    try:
        rows = TypeAdapter(list[Measured]).validate_python(list(reader))
    except (ValidationError, csv.Error) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"no table of processors, wanted the columns {', '.join(columns)}: {reason}") from error
    if list(reader.fieldnames or columns) != columns or not all(math.isfinite(row.gain) for row in rows):
        raise ConfigError(f"no table of processors, wanted the columns {', '.join(columns)} and finite gains")
    return rows


def choose(own: Path) -> Backend:
    """Return the backend of this processor: by its row in the user's own table, else in ours; `torch` without a row.

    Args:
        own: the user's table, which need not exist.

    Raises:
        ConfigError: if it exists and is no table.
    """
    try:
        rows = read_own(own)
    except PermissionError as error:  # in a shared cache, another user's
        _warn_once(f"{own} is not heeded: {error.strerror}")
        rows = []
    for row in (*rows, *read_table(files("aepo").joinpath("kernels.csv").read_text())):
        if row.is_of(processor()):
            return "onednn" if row.gain > MIN_GAIN and has_onednn() else "torch"
    return "torch"


_warn_once = cache(warn)


def read_own(path: Path) -> list[Measured]:
    """Return the rows of a user's own table, none if there is no such file; errors as `choose`, and PermissionError."""
    try:
        return read_table(read_text(path))
    except FileNotFoundError:
        return []
    except PermissionError:
        raise
    except (ConfigError, OSError) as error:
        raise ConfigError(f"{path} is {error}; delete it, `aepo doctor --measure` writes it") from error


def keep(path: Path, row: Measured) -> None:
    """Write a row into a user's own table, in place of one of the same processor and torch."""
    others = [old for old in read_own(path) if (old.key, old.torch) != (row.key, row.torch)]
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Measured)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(each) for each in (row, *others))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue().encode())


def use(backend: Backend) -> None:
    """Multiply by this backend in this process from here on.

    Raises:
        ConfigError: for a backend that is not known, or not there.
    """
    global _backend
    if backend not in backends():
        raise ConfigError(f"this torch cannot multiply by {backend!r}; wanted one of {', '.join(backends())}")
    _backend = backend


def backend() -> Backend:
    """Return the backend in use."""
    return _backend


def backends() -> list[Backend]:
    """Return the backends that this torch has."""
    return [name for name in get_args(Backend) if name != "onednn" or has_onednn()]


def has_onednn() -> bool:
    """Return whether this torch was built with oneDNN."""
    return bool(torch._C._has_mkldnn)


@contextlib.contextmanager
def using(backend: Backend) -> Iterator[None]:
    """Multiply by this backend on the CPU, for as long as it lasts; errors as `use`."""
    before = _backend
    use(backend)
    try:
        yield
    finally:
        use(before)


@contextlib.contextmanager
def matmul_precision(precision: Precision) -> Iterator[None]:
    """Multiply matrices at this precision, on the CPU and on GPUs, for as long as it lasts.

    Small ones stay float32: bfloat16 costs them more than it saves.
    """
    global _small_differ  # as torch's precision is; to ask for that costs as much as a small product
    before, differed = torch.get_float32_matmul_precision(), _small_differ
    torch.set_float32_matmul_precision(MATMUL_PRECISION[precision])
    _small_differ = precision != "float32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        _small_differ = differed


def linear(x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor, activation: Activation | None = None) -> Tensor:
    """Return x W' + b, [B, O], and of that the activation if one is given; differentiable where gradients are on."""
    x_BI = dense(x_BI)
    learns = torch.is_grad_enabled()
    if _backend == "onednn" and _suits_onednn(x_BI, weight_OI):
        if learns:
            return activate(_apply(x_BI, weight_OI, bias_O), activation, inplace=False)
        return _onednn(x_BI, weight_OI, bias_O, activation)
    if _small_differ and _is_small(x_BI, weight_OI):
        with matmul_precision("float32"):
            return activate(F.linear(x_BI, weight_OI, bias_O), activation, inplace=not learns)
    return activate(F.linear(x_BI, weight_OI, bias_O), activation, inplace=not learns)


def product(x_BI: Tensor, y_IO: Tensor) -> Tensor:
    """Return x y, [B, O], without gradients."""
    x_BI, y_IO = dense(x_BI), dense(y_IO)
    if _backend == "onednn" and _suits_onednn(x_BI, y_IO):
        return _onednn(x_BI, y_IO.t(), None)
    if _small_differ and _is_small(x_BI, y_IO):
        with matmul_precision("float32"):
            return torch.mm(x_BI, y_IO)
    return torch.mm(x_BI, y_IO)


def blocks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Return tensors of equally many rows cut alike into blocks that fit the processor's cache; whole on a GPU."""
    if not overflows(tensors[0]):
        return [tensors]
    return list(zip(*(torch.split(tensor, BLOCK_ROWS) for tensor in tensors), strict=True))


def overflows(tensor: Tensor) -> bool:
    """Return whether a tensor has more rows than a block."""
    return tensor.shape[0] > BLOCK_ROWS and tensor.device.type == "cpu"


def dense(x_BI: Tensor) -> Tensor:
    """Return the same numbers in a tensor that is contiguous, or whose transpose is."""
    return x_BI if x_BI.is_contiguous() or x_BI.t().is_contiguous() else x_BI.contiguous()


def activate(x_BH: Tensor, activation: Activation | None, *, inplace: bool) -> Tensor:
    """Return the activation of every number, in the same memory if wished; none returns what it is given."""
    if activation is None:
        return x_BH
    return F.silu(x_BH, inplace=inplace) if activation == "silu" else F.relu(x_BH, inplace=inplace)


def _suits_onednn(x_BI: Tensor, weight_OI: Tensor) -> bool:
    if x_BI.ndim != 2 or x_BI.device.type != "cpu":
        return False
    return x_BI.shape[0] >= MIN_ROWS and not _is_small(x_BI, weight_OI)


def _is_small(x_BI: Tensor, weight_OI: Tensor) -> bool:
    return x_BI.shape[0] * weight_OI.numel() < MIN_PRODUCTS


ONEDNN_NAME: dict[Activation | None, str] = {None: "none", "silu": "swish", "relu": "relu"}


def _onednn(x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, activation: Activation | None = None) -> Tensor:
    name = ONEDNN_NAME[activation]
    product_BO: Tensor = torch.ops.mkldnn._linear_pointwise.default(x_BI, weight_OI, bias_O, name, [], "")
    return product_BO


class _OneDNNLinear(torch.autograd.Function):
    """x W' + b by oneDNN, as often differentiable as one likes."""

    @staticmethod
    def forward(x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        return _onednn(x_BI, weight_OI, bias_O)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004  # torch's signature
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad_BO: Tensor) -> tuple[Tensor | None, ...]:
        x_BI, weight_OI = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        grad_BO = grad_BO.contiguous()
        multiply = _apply if torch.is_grad_enabled() else _onednn  # it is where gradients are differentiated again
        return (
            multiply(grad_BO, weight_OI.t(), None) if wants_x else None,
            multiply(grad_BO.t(), x_BI.t(), None) if wants_weight else None,
            grad_BO.sum(dim=0) if wants_bias else None,
        )


_apply: Callable[[Tensor, Tensor, Tensor | None], Tensor] = _OneDNNLinear.apply
