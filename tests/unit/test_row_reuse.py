"""Row reuse: the backward of some of the rows that were forwarded equals ordinary autograd on these rows, to the bit."""

import copy
import functools
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch._functorch import aot_autograd

from hvp_ray import row_reuse
from hvp_ray.errors import RowReuseError
from hvp_ray.methods.backbones import forward_tokens
from hvp_ray.methods.heads import PrototypeHead
from hvp_ray.row_reuse import RowReuse

ROWS = torch.tensor([7, 0, 3, 4, 11, 2])


def vit(image_px: int = 16, patch_px: int = 4, **options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=image_px,
        patch_size=patch_px,
        embed_dim=32,
        num_heads=2,
        num_classes=0,
        dynamic_img_size=True,
        **{"depth": 1} | options,
    ).train()


def gradients_of(module: nn.Module, outputs: Tensor) -> list[Tensor | None]:
    """Return the gradients of a loss that depends on all outputs, and on each differently."""
    weights = torch.linspace(-1, 1, outputs.numel()).view(outputs.shape)
    loss = (outputs.float() * weights).square().sum()
    return list(torch.autograd.grad(loss, list(module.parameters()), allow_unused=True))


@pytest.fixture(autouse=True)
def nothing_is_forwarded_again(caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest) -> Iterator[None]:
    """Modules that cannot be traced would pass all tests of equality."""
    yield
    if request.node.originalname != "test_modules_that_cannot_be_traced_are_forwarded_again_with_one_sentence":
        assert not caplog.records


def assert_equal_to_ordinary(module: nn.Module, reused: Tensor, *of_rows: Tensor) -> None:
    """Compare outputs and all gradients with an ordinary forward and backward of the chosen rows, to the bit."""
    ordinary = module(*of_rows)
    assert reused.dtype == ordinary.dtype
    assert torch.equal(reused, ordinary)
    found, expected = gradients_of(module, reused), gradients_of(module, ordinary)
    assert any(gradient is not None and gradient.any() for gradient in expected)
    for (name, _), a, b in zip(module.named_parameters(), found, expected, strict=True):
        assert (a is None) == (b is None), name
        assert a is None or torch.equal(a, b), name


@pytest.mark.parametrize(("image_px", "dtype"), [(16, torch.float32), (8, torch.bfloat16)])
def test_chosen_rows_equal_ordinary_autograd_to_the_bit(image_px: int, dtype: torch.dtype) -> None:
    network, images = vit(), torch.randn(12, 3, image_px, image_px)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        outputs, kept = RowReuse(network).forward_all(images)
        assert not outputs.requires_grad
        reused = kept.rows(ROWS)
        assert torch.equal(outputs[ROWS], reused)
        assert_equal_to_ordinary(network, reused, images[ROWS])


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bfloat16"])
def test_two_resolutions_add_up_in_the_same_gradients(mixed: bool) -> None:
    """In bfloat16, to gradients that are added in float32: without autocast's cache, ordinary ones are too."""
    network = vit()
    images, crops = torch.randn(12, 3, 16, 16), torch.randn(20, 3, 8, 8)
    reuse = RowReuse(network)
    crop_rows = torch.arange(0, 20, 3)

    def loss(of_globals: Tensor, of_locals: Tensor) -> Tensor:
        return (of_globals.float().mean(0) * of_locals.float().sum(0)).square().sum()

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        (_, of_images), (_, of_crops) = reuse.forward_all(images), reuse.forward_all(crops)
        reused = loss(of_images.rows(ROWS), of_crops.rows(crop_rows))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed, cache_enabled=False):
        ordinary = loss(network(images[ROWS]), network(crops[crop_rows]))
    found, expected = (torch.autograd.grad(value, list(network.parameters())) for value in (reused, ordinary))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


class _WithHead(nn.Module):
    """DINO's and iBOT's student as one module: masked encoder, then the head's prototypes of all tokens."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.encoder = vit(**options)
        self.head = PrototypeHead(32, hidden_dim=48, bottleneck_dim=16, num_prototypes=24, norm_last_layer=False)
        self.mask_token = nn.Parameter(torch.randn(1, 32))

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return self.head.logits(self.head(self.encoder(images)))
        tokens = forward_tokens(self.encoder, images, mask=mask, mask_token=self.mask_token)
        return self.head.logits(self.head(tokens))


@pytest.mark.parametrize("masked", [False, True])
def test_heads_and_masks_equal_ordinary_autograd_to_the_bit(masked: bool) -> None:
    torch.manual_seed(1)
    student, images = _WithHead(), torch.randn(12, 3, 16, 16)
    masks = [torch.rand(12, 4, 4) < 0.4] if masked else []
    _, kept = RowReuse(student).forward_all(images, *masks)
    assert_equal_to_ordinary(student, kept.rows(ROWS), images[ROWS], *(mask[ROWS] for mask in masks))


@pytest.mark.parametrize("is_student", [False, True], ids=["encoder", "masked student in bfloat16"])
def test_drop_path_is_drawn_with_all_rows_and_kept_for_the_chosen(
    is_student: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The masks are those that an ordinary forward of all rows draws; with their rows, all else is equal to the bit."""
    options, images = {"depth": 2, "drop_path_rate": 0.5}, torch.randn(12, 3, 16, 16)
    network = _WithHead(**options) if is_student else vit(**options)
    inputs = [images, torch.rand(12, 4, 4) < 0.4] if is_student else [images]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_student):
        _check_drop_path(network, inputs, monkeypatch)


def _check_drop_path(network: nn.Module, inputs: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    reuse = RowReuse(network)
    reuse.forward_all(*inputs)  # the trace draws nothing
    torch.manual_seed(5)
    outputs, kept = reuse.forward_all(*inputs)
    reused = kept.rows(ROWS)
    drawn: list[Tensor] = []
    draw = Tensor.bernoulli_

    def record(values: Tensor, probability: float) -> Tensor:
        drawn.append(draw(values, probability).clone())
        return values

    def replay(values: Tensor, probability: float) -> Tensor:
        return values.copy_(drawn.pop(0)[ROWS])

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "bernoulli_", record)
        torch.manual_seed(5)
        assert torch.equal(network(*inputs), outputs)
        assert any(0 < mask.mean() < 1 for mask in drawn)
        patch.setattr(Tensor, "bernoulli_", replay)
        assert_equal_to_ordinary(network, reused, *(value[ROWS] for value in inputs))
    torch.manual_seed(5)
    assert torch.equal(reuse.forward_all(*inputs)[0], outputs)


def test_dropout_equals_autograd_of_all_rows_without_gradient_for_the_others() -> None:
    network, images = vit(proj_drop_rate=0.3, attn_drop_rate=0.2), torch.randn(12, 3, 16, 16)
    reuse = RowReuse(network)
    reuse.forward_all(images)
    torch.manual_seed(5)
    reused = reuse.forward_all(images)[1].rows(ROWS)
    torch.manual_seed(5)
    ordinary = network(images)[ROWS]
    assert torch.equal(reused, ordinary)
    for a, b in zip(gradients_of(network, reused), gradients_of(network, ordinary), strict=True):
        torch.testing.assert_close(a, b)


def test_convolutions_with_group_norm_equal_ordinary_autograd_to_the_bit() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.Flatten(),
    ).to(memory_format=torch.channels_last)
    images = torch.randn(12, 3, 8, 8).to(memory_format=torch.channels_last)
    _, kept = RowReuse(network).forward_all(images)
    assert_equal_to_ordinary(network, kept.rows(ROWS), images[ROWS])


def test_numbers_of_rows_may_equal_sizes_of_the_network() -> None:
    """Patches of 16 px, 4 of them, 32 features, 2 heads; rows may be chosen twice."""
    network = vit(image_px=32, patch_px=16)
    reuse = RowReuse(network)
    for num_rows, num_chosen in [(16, 4), (4, 16), (2, 1), (3, 2), (1, 1), (32, 32)]:
        images, rows = torch.randn(num_rows, 3, 32, 32), torch.arange(num_chosen).flip(0) % num_rows
        reused = reuse.forward_all(images)[1].rows(rows)
        torch.testing.assert_close(reused, network(images[rows]))
        for a, b in zip(gradients_of(network, reused), gradients_of(network, network(images[rows])), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiled_halves_equal_ordinary_autograd(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another number of rows, both are compiled again."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    network = vit()
    reuse = RowReuse(network, compiled=True)
    for num_rows, rows in ((12, ROWS), (8, ROWS[1:3]), (12, ROWS)):
        images = torch.randn(num_rows, 3, 16, 16)
        outputs, kept = reuse.forward_all(images)
        reused, ordinary = kept.rows(rows), network(images[rows])
        assert torch.equal(outputs[rows], reused)
        torch.testing.assert_close(reused, ordinary, rtol=1e-5, atol=1e-5)
        for a, b in zip(gradients_of(network, reused), gradients_of(network, ordinary), strict=True):
            assert a is not None and b is not None
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(b.abs().max())))


def test_parameters_are_read_at_each_step_and_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traces: list[int] = []
    trace = aot_autograd.aot_export_joint_simple

    def counted(*arguments: Any, **options: Any) -> Any:
        traces.append(1)
        return trace(*arguments, **options)

    monkeypatch.setattr(aot_autograd, "aot_export_joint_simple", counted)
    network = vit()
    twin, reuse = copy.deepcopy(network), RowReuse(network)
    optimizers = [torch.optim.SGD(of.parameters(), lr=0.1, momentum=0.9) for of in (network, twin)]
    for step in range(3):
        images = torch.randn(12 + step, 3, 16, 16)
        losses = [reuse.forward_all(images)[1].rows(ROWS), twin(images[ROWS])]
        for optimizer, outputs in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            outputs.square().sum().backward()
            optimizer.step()
    for a, b in zip(network.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(traces) == 2  # with two numbers of rows, once


def test_frozen_parameters_get_no_gradient() -> None:
    network, images = vit(), torch.randn(12, 3, 16, 16)
    network.patch_embed.requires_grad_(requires_grad=False)
    reuse = RowReuse(network)
    reuse.forward_all(images)[1].rows(ROWS).sum().backward()
    assert all(parameter.grad is None for parameter in network.patch_embed.parameters())
    network.patch_embed.requires_grad_()
    reuse.forward_all(images)[1].rows(ROWS).sum().backward()
    assert all(parameter.grad is not None for parameter in network.patch_embed.parameters())


class _MinusMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, rows: Tensor) -> Tensor:
        features = self.layer(rows)
        return features - features.mean(0)


class _RowsInside(nn.Module):
    """Treats rows by themselves, but flattens them inside the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, rows: Tensor) -> Tensor:
        flat = self.layers[0](rows.transpose(0, 1).reshape(-1, 4)).tanh()
        return self.layers[1](flat).reshape(rows.shape[1], -1, 4).transpose(0, 1).contiguous()


class _Similarities(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, rows: Tensor) -> Tensor:
        features = self.layer(rows)
        return features @ features.T


@pytest.mark.parametrize(
    ("module", "shape"), [(_MinusMean(), (5, 4)), (_RowsInside(), (5, 3, 4)), (_Similarities(), (5, 4))]
)
def test_modules_that_mix_rows_are_refused(module: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(RowReuseError, match="rows"):
        RowReuse(module).forward_all(torch.randn(shape))


def test_batch_norm_is_refused_and_its_running_statistics_are_not() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with pytest.raises(RowReuseError, match="1 is a BatchNorm.*Forward the chosen rows again"):
        RowReuse(network)
    network[1].eval()
    images = torch.randn(12, 4)
    _, kept = RowReuse(network).forward_all(images)
    assert_equal_to_ordinary(network, kept.rows(ROWS), images[ROWS])


class _DependsOnValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, rows: Tensor) -> Tensor:
        return self.layer(rows) if rows[0, 0] < 100 else rows


def test_modules_that_cannot_be_traced_are_forwarded_again_with_one_sentence(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = _DependsOnValues()
    reuse = RowReuse(module)
    with caplog.at_level(logging.WARNING):
        for images in (torch.randn(12, 4), torch.randn(12, 4).double().float(), torch.randn(13, 4)):
            outputs, kept = reuse.forward_all(images)
            assert not outputs.requires_grad
            assert_equal_to_ordinary(module, kept.rows(ROWS), images[ROWS])
    assert [record.message.split(":")[0] for record in caplog.records] == ["rows are forwarded again instead of reused"]


def test_what_was_kept_serves_once_and_for_unchanged_parameters() -> None:
    network = vit()
    _, kept = RowReuse(network).forward_all(torch.randn(12, 3, 16, 16))
    reused = kept.rows(ROWS)
    with pytest.raises(RowReuseError, match="call forward_all again"):
        kept.rows(ROWS)
    with torch.no_grad():
        next(network.parameters()).mul_(2.0)
    with pytest.raises(RowReuseError, match="the parameters changed"):
        reused.sum().backward()


def test_parameters_must_not_change_before_rows_are_chosen_either() -> None:
    network = vit()
    _, kept = RowReuse(network).forward_all(torch.randn(12, 3, 16, 16))
    with torch.no_grad():
        next(network.parameters()).mul_(2.0)
    with pytest.raises(RowReuseError, match="the parameters changed"):
        kept.rows(ROWS).sum().backward()


def test_rows_that_are_not_chosen_are_freed() -> None:
    network = vit()
    _, kept = RowReuse(network).forward_all(torch.randn(12, 3, 16, 16))
    before = sum(value.untyped_storage().nbytes() for value in kept._values)
    reused = kept.rows(ROWS[:3])
    after = sum(value.untyped_storage().nbytes() for value in reused.grad_fn.chosen.values)
    assert after == before / 4


def test_of_blocks_only_the_inputs_are_kept_and_the_rest_is_computed_again_to_the_same_bits() -> None:
    """Without drop path against ordinary autograd; with it against rows of which everything is kept."""
    network, images = vit(depth=3), torch.randn(12, 3, 16, 16)
    in_part = RowReuse(network, keep_inputs_of=network.blocks)
    _, few = in_part.forward_all(images)
    _, all_values = RowReuse(network).forward_all(images)
    assert isinstance(few, row_reuse._KeptValues) and isinstance(all_values, row_reuse._KeptValues)
    sizes = [sum(value.nbytes for value in kept._values or []) for kept in (few, all_values)]
    of_inputs = images.nbytes + 4 * 12 * 17 * 32 * 4  # three blocks' inputs and the last one's output, float32
    assert of_inputs <= sizes[0] < 1.1 * of_inputs < 0.5 * sizes[1]
    assert_equal_to_ordinary(network, few.rows(ROWS), images[ROWS])

    network = vit(depth=3, drop_path_rate=0.4)
    gradients = []
    for blocks in (network.blocks, ()):
        reuse = RowReuse(network, keep_inputs_of=blocks)
        reuse.forward_all(images)  # the first call draws more, because it is checked
        torch.manual_seed(3)
        gradients.append(gradients_of(network, reuse.forward_all(images)[1].rows(ROWS)))
    for a, b in zip(*gradients, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


def test_example_of_the_page_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "row_reuse.md").read_text()
    (program,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(program, names)
    assert all(parameter.grad is not None for parameter in names["encoder"].parameters())
