"""Low-rank adaptation: nothing at the start, gradients to both factors, and gone once it is merged."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from cardiac_ldm.models.denoiser import Denoiser
from cardiac_ldm.models.lora import LowRank, add_lora, merge_lora

RANGE = torch.stack([torch.zeros(14), torch.full((14,), 10.0)])


@pytest.fixture
def model() -> Denoiser:
    torch.manual_seed(0)
    built = Denoiser(2, 1, (8, 16), (False, True), 1, 2, 16, 2, 5, RANGE, "modern")
    for parameter in built.parameters():  # what starts at zero would hide the paths behind it
        nn.init.normal_(parameter, std=0.1)
    return built.eval()


def output(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, attributes = torch.randn(2, 2, 5, 8, 8, generator=generator), torch.rand(2, 14, generator=generator)
    return model(latents, torch.tensor([3, 120]), attributes)


def moved(tuned: dict[str, nn.Parameter]) -> None:
    """Give every factor numbers, as training would."""
    for number, parameter in enumerate(tuned.values()):
        with torch.no_grad():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))


def test_it_lies_where_its_layer_does() -> None:
    layer = nn.Linear(3, 4, device="meta")  # which stands for a GPU
    add_lora([layer], 2)
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}


def test_it_starts_as_the_identity(model: Denoiser) -> None:
    before = output(model)
    tuned = model.tunable("lora-4")
    assert torch.equal(output(model), before)
    assert {name.rsplit(".", 1)[1] for name in tuned} == {"up", "down"}
    assert all(name.endswith("up") != bool(p.any()) for name, p in tuned.items())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(tuned)


def test_it_starts_alike_in_every_process(model: Denoiser) -> None:
    other = deepcopy(model)
    torch.manual_seed(1)
    first = model.tunable("lora-2")
    torch.manual_seed(2)
    for name, parameter in other.tunable("lora-2").items():
        assert torch.equal(parameter, first[name]), name
    starts = [p for name, p in first.items() if name.endswith("down")]
    assert not any(a.shape == b.shape and torch.equal(a, b) for i, a in enumerate(starts) for b in starts[:i])


def test_its_rank_sets_how_much_is_tuned(model: Denoiser) -> None:
    layers = sum(isinstance(m, nn.Conv2d | nn.Conv3d) for m in model.modules())
    sizes = {}
    for rank in (1, 3):
        tuned = deepcopy(model).tunable(f"lora-{rank}")
        assert len(tuned) > 2 * layers  # attention's linear layers too
        assert all(p.shape[1 if name.endswith("up") else 0] == rank for name, p in tuned.items())
        sizes[rank] = sum(p.numel() for p in tuned.values())
    assert sizes[3] == 3 * sizes[1]
    assert sizes[1] < sum(p.numel() for p in model.parameters()) / 5


def test_gradients_reach_both_factors(model: Denoiser) -> None:
    tuned = model.tunable("lora-2")
    first = torch.autograd.grad(output(model).square().mean(), list(tuned.values()))
    for name, gradient in zip(tuned, first, strict=True):  # up is 0 at the start, so down's gradient is too
        assert bool(gradient.any()) == name.endswith("up"), name
    moved(tuned)
    for gradient in torch.autograd.grad(output(model).square().mean(), list(tuned.values())):
        assert gradient.any()


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 4), nn.Conv2d(3, 4, 3), nn.Conv3d(3, 4, (3, 1, 1))], ids=["linear", "plane", "depth"]
)
def test_a_layer_computes_with_w_plus_u_d(layer: nn.Linear | nn.Conv2d | nn.Conv3d) -> None:
    plain = deepcopy(layer)
    weight = plain.weight.detach().clone()
    add_lora([plain], 2)
    adaptation = plain.parametrizations.weight[0]  # type: ignore[union-attr, index]
    assert isinstance(adaptation, LowRank)
    nn.init.normal_(adaptation.up)
    change = plain.weight.detach() - weight
    assert torch.allclose(change.flatten(1), adaptation.up @ adaptation.down, atol=1e-6)
    assert torch.linalg.matrix_rank(change.flatten(1)) == 2


def test_merging_gives_the_architecture_back(model: Denoiser) -> None:
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    fresh = deepcopy(model)
    moved(model.tunable("lora-2"))
    adapted = output(model)
    assert merge_lora(model) is model
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    assert torch.allclose(output(model), adapted, atol=1e-5)
    assert not torch.allclose(output(fresh), adapted, atol=1e-2)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(output(fresh), output(model))


def test_merging_leaves_a_model_without_it_alone(model: Denoiser) -> None:
    before = deepcopy(model.state_dict())
    merge_lora(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
