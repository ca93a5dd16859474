"""Muon: what a step on a hidden matrix is, whom the auxiliary optimizer steps, and that a stopped run goes on to the
last bit.
"""

import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from image_classifier.errors import ConfigError
from image_classifier.training.optimizers.muon import Muon, newton_schulz, orthogonalised

SIDES = st.integers(1, 24)


def quintic(values: torch.Tensor, steps: int) -> torch.Tensor:
    """What the iteration does to each singular value, in float64."""
    for _ in range(steps):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return values


def matrix(rows: int, columns: int, seed: int, conditioned: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    left, values, right = torch.linalg.svd(drawn, full_matrices=False)
    return left @ torch.diag(values.clamp(min=conditioned * float(values.max()))) @ right


@given(rows=SIDES, columns=SIDES, seed=st.integers(0, 1000), steps=st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_the_iteration_keeps_the_singular_vectors_and_maps_the_values_as_its_polynomial_does(
    rows: int, columns: int, seed: int, steps: int
) -> None:
    given_matrix = matrix(rows, columns, seed)
    left, values, right = torch.linalg.svd(given_matrix / given_matrix.norm(), full_matrices=False)
    expected = left @ torch.diag(quintic(values, steps)) @ right
    found = newton_schulz(given_matrix[None], steps, torch.float64)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("dtype", "slack"), [(torch.float64, 0.0), (torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@given(rows=SIDES, columns=SIDES, seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_an_update_is_nearly_orthogonal(dtype: torch.dtype, slack: float, rows: int, columns: int, seed: int) -> None:
    update = newton_schulz(matrix(rows, columns, seed, conditioned=0.05).float()[None], 5, dtype)[0].double()
    values = torch.linalg.svdvals(update)
    assert 0.65 - slack < float(values.min())
    assert float(values.max()) < 1.25 + slack


@given(rows=SIDES, columns=SIDES, seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_transposing_before_and_after_are_the_same(rows: int, columns: int, seed: int) -> None:
    given_matrix = matrix(rows, columns, seed)[None]
    torch.testing.assert_close(
        newton_schulz(given_matrix.mT, 5, torch.float64),
        newton_schulz(given_matrix, 5, torch.float64).mT,
        rtol=0,
        atol=1e-10,
    )


def test_a_gradient_of_zeros_moves_nothing() -> None:
    weight = nn.Parameter(torch.randn(4, 3))
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    Muon([{"params": [weight], "kind": "matrix"}]).step()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_kernel_is_stepped_as_the_matrix_of_its_rows_whatever_its_layout(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    flat = nn.Parameter(torch.randn(8, 2 * 3 * 3))
    kernel = nn.Parameter(flat.detach().view(8, 2, 3, 3).clone(memory_format=layout))
    flat.grad = torch.randn_like(flat)
    kernel.grad = flat.grad.view(8, 2, 3, 3).clone(memory_format=layout)
    Muon([{"params": [flat, kernel], "kind": "matrix"}], lr=0.1, weight_decay=0.1).step()
    torch.testing.assert_close(kernel.flatten(1), flat, rtol=0, atol=0.02 * 0.1 * 0.2 * math.sqrt(18))
    assert kernel.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    ("scale", "length"), [("match_rms_adamw", 0.2 * math.sqrt(12)), ("original", math.sqrt(2)), ("none", 1.0)]
)
def test_the_length_of_a_step_is_what_the_scale_says(scale: str, length: float) -> None:
    weight = nn.Parameter(torch.zeros(12, 6))
    weight.grad = matrix(12, 6, 0, conditioned=0.5).float()
    Muon([{"params": [weight], "kind": "matrix"}], lr=1.0, scale=scale).step()
    values = torch.linalg.svdvals(weight.detach()) / length
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3


def test_normalised_weights_have_the_norm_of_an_orthogonal_matrix_before_each_step() -> None:
    weight = nn.Parameter(5 * torch.randn(9, 4, 3, 3))
    weight.grad = torch.zeros_like(weight)
    Muon([{"params": [weight], "kind": "matrix"}], normalise_weights=True).step()
    assert float(weight.detach().norm()) == pytest.approx(3.0, rel=1e-5)


@pytest.mark.parametrize("auxiliary", ["sgd", "adamw"])
def test_what_is_no_hidden_matrix_is_stepped_as_torch_would(auxiliary: str) -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(5, 3))]
    theirs = copy.deepcopy(ours)
    muon = Muon(
        [
            {"params": [nn.Parameter(torch.randn(6, 6))], "kind": "matrix"},
            {"params": [ours[0]], "kind": "head"},
            {"params": [ours[1]], "kind": "vector", "weight_decay": 0.0},
            {"params": [ours[2]], "kind": "stem"},
        ],
        lr=0.5,
        auxiliary=auxiliary,
        auxiliary_lr=0.01,
        auxiliary_weight_decay=0.1,
        head_lr_scale=4.0,
    )
    groups = [
        {"params": [theirs[0]], "lr": 0.04},
        {"params": [theirs[1]], "weight_decay": 0.0},
        {"params": [theirs[2]]},
    ]
    if auxiliary == "sgd":
        reference: torch.optim.Optimizer = torch.optim.SGD(groups, 0.01, 0.9, nesterov=True, weight_decay=0.1)
    else:
        reference = torch.optim.AdamW(groups, 0.01, (0.9, 0.95), weight_decay=0.1)
    for _ in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        muon.step()
        reference.step()
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4))


def groups_of(model: nn.Sequential) -> list[dict[str, object]]:
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    return [
        {"params": [model[2].weight], "kind": "matrix"},
        {"params": [model[4].weight], "kind": "head"},
        {"params": [model[0].weight], "kind": "stem"},
        {"params": vectors, "kind": "vector", "weight_decay": 0.0},
    ]


def learn(model: nn.Sequential, muon: Muon, steps: range) -> float:
    loss = torch.zeros(())
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        targets = torch.randint(0, 4, (32,), generator=generator)
        images = torch.randn(32, 3, 8, 8, generator=generator) + targets.view(-1, 1, 1, 1)
        muon.zero_grad()
        loss = nn.functional.cross_entropy(model(images), targets)
        loss.backward()
        muon.step()
    return float(loss.detach())


@pytest.mark.parametrize("auxiliary", ["sgd", "adamw"])
def test_a_run_that_was_saved_goes_on_to_the_last_bit(auxiliary: str) -> None:
    whole, first = network(), network()
    learn(whole, Muon(groups_of(whole), lr=0.01, auxiliary=auxiliary), range(6))
    muon = Muon(groups_of(first), lr=0.01, auxiliary=auxiliary)
    learn(first, muon, range(3))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": muon.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = network()
    resumed.load_state_dict(saved["model"])
    again = Muon(groups_of(resumed), lr=0.01, auxiliary=auxiliary)
    again.load_state_dict(saved["optimizer"])
    learn(resumed, again, range(3, 6))
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_it_learns_and_a_copy_of_it_steps_too() -> None:
    model = network()
    muon = Muon(groups_of(model), lr=0.01)
    before = learn(model, muon, range(1))
    assert learn(model, muon, range(1, 40)) < before / 2
    copy.deepcopy(muon).step()


def test_groups_without_a_kind_are_hidden_matrices_where_all_of_them_have_rows() -> None:
    model = network()
    muon = Muon([{"params": [model[2].weight]}, {"params": [model[2].bias]}])
    assert [group["kind"] for group in muon.param_groups] == ["matrix", "vector"]


def test_parameters_without_a_gradient_stay() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    Muon(groups_of(model)).step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "arguments",
    [{"scale": "rms"}, {"auxiliary": "lion"}, {"lr": -1.0}, {"momentum": 1.0}, {"newton_schulz_steps": 0}],
    ids=lambda one: next(iter(one)),
)
def test_impossible_settings_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Muon(groups_of(network()), **arguments)  # type: ignore[arg-type]


def test_flat_parts_of_matrices_are_refused() -> None:
    with pytest.raises(ConfigError, match="complete matrices"):
        Muon([{"params": [nn.Parameter(torch.zeros(5))], "kind": "matrix"}])


def test_an_exact_run_orthogonalises_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("image_classifier.training.optimizers.muon.number_format", lambda device: torch.bfloat16)
    directions = [matrix(24, 12, seed).float() for seed in range(3)]
    expected = newton_schulz(torch.stack(directions), 5, torch.float32)
    assert all(
        torch.equal(found, one) for found, one in zip(orthogonalised(directions, 5, exact=True), expected, strict=True)
    )
    assert not torch.equal(orthogonalised(directions, 5)[0], expected[0])
