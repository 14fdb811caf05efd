"""Laws 12 to 15: the same method on every kind of layer, dtype, memory format and device."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from filterwise.filters import FilterLayout, layout_of
from support.cases import PLAIN, Subject
from support.compare import assert_close, assert_same, per_row
from support.hosts import HOSTS
from support.laws import host_law
from support.models import HostCase
from support.tolerances import OUTPUT, REFERENCE_FLOOR, TOLERANCE

FAST = ("f32", "f64")


class Copies(TorchDispatchMode):
    """Lists operations that move the elements of a whole weight into another layout."""

    NAMES = ("clone", "contiguous", "copy_", "_to_copy", "index", "index_select", "cat")

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        if name in self.NAMES and any(value.numel() >= self.size for value in tensors):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def stored(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the same values in other storage orders."""
    found = {
        "sliced": torch.stack([weight, weight], -1)[..., 0],
        "transposed": weight.transpose(0, 1).contiguous().transpose(0, 1),
    }
    if weight.dim() in (4, 5):
        order = torch.channels_last if weight.dim() == 4 else torch.channels_last_3d
        found["channels_last"] = weight.contiguous(memory_format=order)
    return found


@host_law(
    12,
    rejects={"always_contiguous": "ws-Conv2d-f32", "storage_order": "wa-Conv2d-f32"},
    dtypes=("bf16", "f32"),
)
def test_law12_layout(hosted: HostCase):
    """Storage order changes no value; a dense weight's strides are kept, and nothing is copied."""
    layer = hosted.layer()
    before = hosted.effective(layer)
    raw = getattr(layer, hosted.host.parameter)
    allowed = 2 * TOLERANCE[hosted.dtype] * float(before.detach().abs().max())
    for name, weight in stored(raw.detach()).items():
        layer._parameters[hosted.host.parameter] = nn.Parameter(weight)
        with Copies(weight.numel()) as copies:
            found = hosted.effective(layer)
            found.backward(torch.empty_like(weight).copy_(weight))
        assert_close(found, before, absolute=allowed, what=name)
        if name == "sliced":
            continue
        assert found.stride() == weight.stride(), name
        if hosted.dtype == torch.float32 and not hosted.case.cells:
            assert copies.found == ["copy_"], f"{name}: {copies.found}"  # the upstream's own


@host_law(
    13,
    rejects={
        "ungrouped_transposed": "ws-ConvTranspose2d[g=2]-f64",
        "axis_0": "ws-ConvTranspose1d-f32",
    },
)
def test_law13_hosts_are_views(hosted: HostCase):
    """On every host the effective weight is the reference on the rows of the host table."""
    layer = hosted.layer()
    effective = hosted.effective(layer).detach()
    found, expected = hosted.host.rows(layer, effective), hosted.expected(layer)
    floor = REFERENCE_FLOOR[hosted.dtype] * per_row(expected)
    relative = torch.finfo(hosted.dtype).eps if hosted.dtype != torch.float64 else 0.0
    assert_close(found, expected, absolute=floor, relative=relative, what="effective weight")
    if hosted.dtype in OUTPUT:  # half-precision convolutions are torch's own affair
        x = hosted.x()
        out = hosted.host.plain(layer, x, effective)
        assert_close(layer(x), out, absolute=OUTPUT[hosted.dtype] * per_row(out).max())


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.id)
def test_law13_view_and_inverse(host):
    """`matrix` reads the rows of the host table, and `fill` puts them back where they were."""
    layer = host.make()
    like = getattr(layer, host.parameter)
    weight = torch.arange(float(like.numel())).view(like.shape)
    layout = layout_of(layer, host.parameter)
    rows = host.rows(layer, weight)
    assert (layout.filters(like.shape), layout.fan_in(like.shape)) == tuple(rows.shape)
    assert_same(layout.matrix(weight), rows, "rows")
    assert_same(layout.fill(layout.matrix(weight), weight), weight, "inverse")
    assert_same(host.back(layer, rows, weight), weight, "the table's own inverse")


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.id)
def test_law13_a_row_is_all_weights_that_feed_one_output_channel(host):
    """The host table itself: only that channel moves when a row moves."""
    layer = host.make().double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    x = torch.rand(host.input_shape, dtype=torch.float64)
    weight = getattr(layer, host.parameter).detach()
    before = host.plain(layer, x, weight)
    axis = -1 if isinstance(layer, nn.Linear) else 1
    rows = host.rows(layer, weight)
    for channel in (0, 5, 11):
        changed = rows.clone()
        changed[channel] += 1.0
        moved = host.plain(layer, x, host.back(layer, changed, weight)) != before
        dims = [d for d in range(before.dim()) if d != axis % before.dim()]
        assert moved.any(dim=dims).nonzero().flatten().tolist() == [channel]


def test_law13_the_ungrouped_order_is_another_matrix():
    """The control: a grouped transposed weight read as if it had one group."""
    (host,) = [host for host in HOSTS if host.id == "ConvTranspose2d[g=2]"]
    layer = host.make()
    wrong = FilterLayout(axis=1, groups=1).matrix(layer.weight)
    assert wrong.shape != host.rows(layer, layer.weight).shape


@host_law(
    14,
    rejects={"always_float32": "ws-Conv2d-bf16", "on_the_cpu": "wa-Linear-f32"},
    dtypes=("bf16", "f32"),
)
def test_law14_shape_dtype_device(hosted: HostCase):
    """The effective weight has the raw weight's shape, dtype and device, whatever is done to it."""
    layer = hosted.layer()
    raw = getattr(layer, hosted.host.parameter)
    found = hosted.effective(layer)
    assert (found.shape, found.dtype) == (raw.shape, hosted.dtype)
    for dtype in (torch.float16, torch.float64, torch.float32):
        assert hosted.effective(layer.to(dtype)).dtype == dtype
    layer.to("meta")
    found = hosted.effective(layer)
    assert (found.shape, found.device.type) == (raw.shape, "meta")
    layer.to_empty(device="cpu")
    assert hosted.effective(layer).device.type == "cpu"


@host_law(14, rejects={"half_under_autocast": "ws-Conv2d-f32"}, dtypes=("f32",))
def test_law14_autocast(hosted: HostCase):
    """Under autocast the output has the plain layer's dtype, and statistics stay in float32."""
    layer, x = hosted.layer(), hosted.x()
    with torch.autocast("cpu", torch.bfloat16):
        out, plain = layer(x), hosted.plain()(x)
        effective = hosted.effective(layer)
        expected = hosted.host.plain(layer, x, effective)
    assert out.dtype == plain.dtype
    assert_same(out, expected, "output")
    floor = REFERENCE_FLOOR[torch.float32] * per_row(hosted.expected(layer))
    found = hosted.host.rows(layer, effective.detach())
    eps = torch.finfo(torch.float32).eps
    assert_close(found, hosted.expected(layer), absolute=floor, relative=eps, what="statistics")


@host_law(
    15,
    rejects={
        "centres_in_place": "ws-Conv2d-f32",
        "noisy": "wa-Linear-f64",
        "reads_mode": "pws-Conv1d-f32",
    },
    dtypes=FAST,
)
def test_law15_pure_and_repeatable(hosted: HostCase):
    """Reading changes nothing, draws nothing, and gives the same bits in every mode."""
    layer = hosted.layer()
    tensors = dict(layer.state_dict(keep_vars=True))
    before = {name: (value.detach().clone(), value._version) for name, value in tensors.items()}
    random = torch.get_rng_state()
    first = hosted.effective(layer)
    assert_same(hosted.effective(layer), first, "again")
    for mode in (True, False):
        assert_same(hosted.effective(layer.train(mode)), first, f"training={mode}")
    if not hosted.case.method().uses_input:
        # A method that declares no difference between the modes must not ask for the mode.
        flag = layer.__dict__.pop("training")
        assert_same(hosted.effective(layer), first, "without a mode")
        layer.training = flag
    assert_same(torch.get_rng_state(), random, "random state")
    for name, (bits, version) in before.items():
        assert tensors[name]._version == version, name
        assert_same(tensors[name].detach(), bits, name)


def digest() -> str:
    """Return a hash of the bits of every method's effective weight."""
    found = hashlib.sha256()
    for case in PLAIN:
        subject = Subject(case, torch.float32)
        found.update(subject.effective(subject.draw(), subject.gain()).numpy().tobytes())
    return found.hexdigest()


def test_law15_the_same_bits_in_a_second_process():
    paths = [path for path in sys.path if path]
    code = (
        f"import sys; sys.path[:0] = {paths!r}\n"
        "import torch; torch.set_num_threads(1)\n"
        "from laws.test_hosts import digest; print(digest())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip() == digest()
