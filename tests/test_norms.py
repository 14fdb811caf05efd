"""Which modules are norms, and what takes their place."""

from __future__ import annotations

import pytest
import torch
from timm.layers import BatchNormAct2d, GroupNormAct, convert_sync_batchnorm
from timm.layers import LayerNorm2d as TimmLayerNorm2d
from timm.layers.filter_response_norm import FilterResponseNormAct2d
from timm.layers.inplace_abn import InplaceAbn
from timm.layers.norm_act import FrozenBatchNormAct2d, LayerNormAct, LayerNormAct2d
from torch import nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import FrozenBatchNorm2d

from filterwise import norms

NORMS = [
    nn.BatchNorm1d(4),
    nn.BatchNorm2d(4),
    nn.BatchNorm3d(4),
    nn.SyncBatchNorm(4),
    nn.GroupNorm(2, 4),
    nn.InstanceNorm1d(4),
    nn.InstanceNorm2d(4, affine=True),
    nn.LazyBatchNorm2d(),
    LayerNorm2d(4),
    TimmLayerNorm2d(4),
    FrozenBatchNorm2d(4),
    FrozenBatchNormAct2d(4),
    BatchNormAct2d(4),
    GroupNormAct(4, 2),
    LayerNormAct2d(4),
    FilterResponseNormAct2d(4),
    InplaceAbn(4),
    convert_sync_batchnorm(BatchNormAct2d(4)),
]
OTHERS = [
    nn.LayerNorm(4),
    nn.RMSNorm(4),
    LayerNormAct(4),
    nn.LocalResponseNorm(2),
    nn.Conv2d(4, 4, 3),
    nn.LazyLinear(4),
    nn.Identity(),
    nn.ReLU(),
    nn.PReLU(4),
    nn.MultiheadAttention(4, 2),
]


def name_of(module):
    return type(module).__name__


@pytest.mark.parametrize("module", NORMS, ids=name_of)
def test_is_an_activation_norm(module):
    assert norms.is_norm(module)
    assert norms.normalizes(module)


@pytest.mark.parametrize("module", OTHERS, ids=name_of)
def test_is_no_activation_norm(module):
    assert not norms.is_norm(module)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.LayerNorm(4), True),
        (nn.RMSNorm(4), True),
        (LayerNormAct(4), True),
        (nn.LocalResponseNorm(2), False),
        (nn.Conv2d(4, 4, 3), False),
    ],
    ids=lambda value: name_of(value) if isinstance(value, nn.Module) else "",
)
def test_norms_that_no_recipe_touches_normalize_all_the_same(module, expected):
    assert norms.normalizes(module) is expected


@pytest.mark.parametrize("module", NORMS, ids=name_of)
def test_channels(module):
    if isinstance(module, nn.LazyBatchNorm2d):
        with pytest.raises(ValueError, match="it is lazy and has seen no input"):
            norms.channels(module)
    else:
        assert norms.channels(module) == 4


@pytest.mark.parametrize(
    ("count", "groups"),
    # The rule by hand: 24 = 12 * 2, 48 = 24 * 2, 40 = 20 * 2, 100 = 25 * 4, 7 and 67 are prime.
    [
        (32, 32),
        (64, 32),
        (96, 32),
        (24, 12),
        (48, 24),
        (40, 20),
        (100, 25),
        (2, 1),
        (7, 1),
        (67, 1),
    ],
)
def test_gn_takes_32_groups_or_the_largest_divisor_that_leaves_two_channels(count, groups):
    new, reason = norms.replacement(nn.BatchNorm2d(count), "gn")
    assert (type(new), new.num_groups, new.num_channels) == (nn.GroupNorm, groups, count)
    assert ("do not divide by 32" in reason) == (count % 32 != 0)
    assert reason.startswith(f"{groups} group")


def test_gn_of_a_single_channel_has_one_group():
    new, reason = norms.replacement(nn.BatchNorm2d(1), "gn")
    assert new.num_groups == 1
    assert reason == "1 group of 1 channel: 1 do not divide by 32"


@pytest.mark.parametrize(("wanted", "groups"), [("ln", 1), ("in", 12), ("gn(4)", 4), ("gn(6)", 6)])
def test_the_other_words_are_group_norms_too(wanted, groups):
    new, _ = norms.replacement(nn.BatchNorm2d(12), wanted)
    assert (type(new), new.num_groups, new.num_channels) == (nn.GroupNorm, groups, 12)
    assert (new.eps, new.affine) == (1e-5, True)


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(
        ValueError, match=r"24 channels do not divide into 16 groups. Write gn\(12\)"
    ):
        norms.replacement(nn.BatchNorm2d(24), "gn(16)")


def test_instance_norm_by_groups_equals_torch():
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    new, _ = norms.replacement(nn.BatchNorm2d(6).double(), "in")
    torch.testing.assert_close(new(x), nn.InstanceNorm2d(6)(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("norm", "wanted"),
    [
        (nn.BatchNorm2d(64), "bn"),
        (nn.SyncBatchNorm(64), "bn"),
        (BatchNormAct2d(64), "bn"),
        (nn.GroupNorm(32, 64), "gn"),
        (nn.GroupNorm(32, 64), "gn(32)"),
        (nn.GroupNorm(1, 64), "ln"),
        (nn.GroupNorm(64, 64), "in"),
        (nn.InstanceNorm2d(64), "in"),
        (nn.BatchNorm2d(64), "keep"),
    ],
    ids=lambda value: name_of(value) if isinstance(value, nn.Module) else value,
)
def test_a_norm_of_the_kind_that_is_wanted_stays(norm, wanted):
    new, reason = norms.replacement(norm, wanted)
    assert new is norm
    assert reason.startswith("already" if wanted != "keep" else "the recipe keeps")


@pytest.mark.parametrize(
    ("norm", "wanted"),
    [
        (nn.GroupNorm(8, 64), "gn"),
        (LayerNorm2d(64), "ln"),  # per position; one group takes all positions together
        (nn.InstanceNorm2d(32, track_running_stats=True), "gn"),  # evaluates by running statistics
        (FrozenBatchNorm2d(8), "bn"),
    ],
    ids=lambda value: name_of(value) if isinstance(value, nn.Module) else value,
)
def test_a_norm_of_nearly_the_kind_does_not_stay(norm, wanted):
    assert norms.replacement(norm, wanted)[0] is not norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("wanted", ["gn", "ln", "in", "bn"])
def test_replacing_keeps_affine_values_dtype_mode_and_what_is_frozen(wanted, dtype):
    norm = nn.InstanceNorm2d(6, affine=True).to(dtype).eval()
    norm.weight.requires_grad_(False)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(6.0))
    new, _ = norms.replacement(norm, wanted)
    if wanted == "in":
        assert new is norm
        return
    assert new.weight is norm.weight  # the same parameter: an optimizer goes on with it
    assert new.bias is norm.bias
    assert not new.weight.requires_grad
    assert new.bias.requires_grad
    assert not new.training
    assert all(t.dtype == dtype for t in new.state_dict().values() if t.is_floating_point())
    assert new(torch.randn(2, 6, 3, 3, dtype=dtype)).dtype == dtype


def test_a_norm_without_affine_values_stays_without():
    new, _ = norms.replacement(nn.BatchNorm2d(8, affine=False), "gn")
    assert not new.affine
    assert new.weight is None
    assert list(new.parameters()) == []


def test_new_statistics_lie_where_they_are_told():
    like = torch.empty(0, device="meta", dtype=torch.float16)
    new, reason = norms.replacement(nn.GroupNorm(2, 4, affine=False), "bn", dimension=1, like=like)
    assert isinstance(new, nn.BatchNorm1d)
    assert (new.running_mean.device.type, new.running_mean.dtype) == ("meta", torch.float16)
    assert reason == "new statistics"


def test_batch_norm_takes_its_dimension_from_the_norm_before_the_caller():
    new, _ = norms.replacement(nn.InstanceNorm3d(4), "bn", dimension=2)
    assert isinstance(new, nn.BatchNorm3d)


def test_batch_norm_of_unknown_dimension_is_refused():
    with pytest.raises(ValueError, match="GroupNorm does not tell whether its input has 1, 2 or 3"):
        norms.replacement(nn.GroupNorm(2, 4), "bn")


def test_a_lazy_norm_is_replaced_where_the_channels_are_told():
    new, _ = norms.replacement(nn.LazyBatchNorm2d(), "gn", 12)
    assert (new.num_groups, new.weight.shape) == (6, (12,))
    torch.testing.assert_close(new.weight, nn.Parameter(torch.ones(12)))
    torch.testing.assert_close(new.bias, nn.Parameter(torch.zeros(12)))


def frozen_batch_norm(cls):
    norm = cls(6)
    for name, buffer in norm.named_buffers():
        buffer.copy_(torch.rand(6) + (0.5 if name != "bias" else -0.5))
    return norm.eval()


def test_a_frozen_batch_norm_becomes_one_with_the_same_function():
    norm = frozen_batch_norm(FrozenBatchNorm2d)
    new, reason = norms.replacement(norm, "bn")
    x = torch.randn(2, 6, 3, 3)
    torch.testing.assert_close(new(x), norm(x))
    assert type(new) is nn.BatchNorm2d
    assert not any(parameter.requires_grad for parameter in new.parameters())
    assert reason == "statistics taken over; the affine values stay frozen"


def test_a_frozen_batch_norm_gives_its_affine_values_to_a_group_norm():
    norm = frozen_batch_norm(FrozenBatchNorm2d)
    new, _ = norms.replacement(norm, "gn")
    torch.testing.assert_close(new.weight.detach(), norm.weight)
    assert not new.weight.requires_grad
    assert new.weight.data_ptr() != norm.weight.data_ptr()


@pytest.mark.parametrize("wanted", ["gn", "ln", "in"])
def test_a_fused_norm_becomes_its_librarys_counterpart(wanted):
    norm = BatchNormAct2d(12, act_layer=nn.PReLU, drop_layer=nn.Dropout).eval()
    new, _ = norms.replacement(norm, wanted)
    assert type(new) is GroupNormAct
    assert new.act is norm.act
    assert new.drop is norm.drop
    assert new.state_dict().keys() == {"weight", "bias", "act.weight"}
    x = torch.randn(2, 12, 3, 3)
    groups = {"gn": 6, "ln": 1, "in": 12}[wanted]
    expected = torch.where(
        (y := nn.functional.group_norm(x, groups)) > 0, y, 0.25 * y
    )  # PReLU starts at slope 1/4
    torch.testing.assert_close(new(x), expected)


def test_a_fused_group_norm_becomes_a_fused_batch_norm():
    norm = GroupNormAct(12, 4, act_layer=nn.SiLU)
    new, _ = norms.replacement(norm, "bn", dimension=2)
    assert type(new) is BatchNormAct2d
    assert new.act is norm.act


def test_a_synchronized_fused_norm_finds_its_counterpart_too():
    norm = convert_sync_batchnorm(BatchNormAct2d(12, act_layer=nn.PReLU))
    new, _ = norms.replacement(norm, "gn")
    assert type(new) is GroupNormAct
    assert new.act is norm.act


def test_removing_a_fused_norm_leaves_dropout_and_activation_under_their_keys():
    norm = BatchNormAct2d(4, act_layer=nn.PReLU, drop_layer=nn.Dropout)
    new, reason = norms.replacement(norm, "none")
    assert [name for name, _ in new.named_children()] == ["drop", "act"]
    assert new.state_dict().keys() == {"act.weight"}
    assert reason == "what was fused stays: drop, act"


def test_dropout_stands_before_the_activation_however_they_were_registered():
    norm = convert_sync_batchnorm(BatchNormAct2d(4, drop_layer=nn.Dropout))
    assert [name for name, _ in norm.named_children()] == ["act", "drop"]
    new, _ = norms.replacement(norm, "none")
    assert [name for name, _ in new.named_children()] == ["drop", "act"]


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(4), BatchNormAct2d(4, apply_act=False)], ids=name_of
)
def test_removing_a_norm_without_activation_leaves_an_identity(norm):
    new, reason = norms.replacement(norm.eval(), "none")
    assert type(new) is nn.Identity
    assert not new.training
    assert reason == ""


def test_an_activation_named_in_words_is_kept():
    new, _ = norms.replacement(InplaceAbn(4, act_param=0.2), "gn")
    norm, activation = new
    assert isinstance(norm, nn.GroupNorm)
    assert isinstance(activation, nn.LeakyReLU)
    assert activation.negative_slope == 0.2


def test_hooks_go_over_and_can_be_removed_by_their_handles():
    seen = []
    norm = nn.BatchNorm2d(4)
    handle = norm.register_forward_hook(lambda *_: seen.append("after"))
    norm.register_forward_pre_hook(lambda *_: seen.append("before"))
    for wanted in ("gn", "none"):
        new, _ = norms.replacement(norm, wanted)
        new(torch.randn(2, 4, 3, 3))
    assert seen == ["before", "after"] * 2
    handle.remove()
    new(torch.randn(2, 4, 3, 3))
    assert seen[-1] == "before"


def test_the_norm_itself_is_not_changed():
    norm = BatchNormAct2d(12, act_layer=nn.PReLU, drop_layer=nn.Dropout)
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    shown, random = repr(norm), torch.get_rng_state()
    for wanted in ("gn", "ln", "in", "none"):
        norms.replacement(norm, wanted)
    assert repr(norm) == shown
    assert norm.training
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in norm.state_dict().items():
        assert torch.equal(tensor, before[name])


class RectifiedBatchNorm(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


class SlowBatchNorm(nn.BatchNorm2d):
    def forward(self, input):
        input = input.contiguous()
        return super().forward(input)


@pytest.mark.parametrize("wanted", ["gn", "ln", "none"])
def test_an_activation_written_into_a_forward_is_not_lost_in_silence(wanted):
    with pytest.raises(ValueError, match=r"RectifiedBatchNorm.forward does more than its norm"):
        norms.replacement(RectifiedBatchNorm(4), wanted)
    assert norms.replacement(SlowBatchNorm(4), wanted)[0] is not None
