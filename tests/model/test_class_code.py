"""Weights that a module's own code takes, in the settings that it has; the code is read and not run."""

import pytest
import torch
from tests.tiny_models import config_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bitwright.model.class_code import weights_taken


class Mixer(nn.Module):
    def __init__(self, parts: int = 1, slow: bool = False) -> None:
        super().__init__()
        self.called, self.given, self.asked, self.sliced = (nn.Linear(2, 2) for _ in range(4))
        self.in_training, self.in_parts = nn.Linear(2, 2), nn.Linear(2, 2)
        self.parts, self.slow = parts, slow

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x).to(self.asked.weight.dtype)
        if self.training:
            x = x @ self.in_training.weight
        if self.parts > 1 and self.slow:
            x = x @ self.in_parts.weight[:, :1]
        elif x.is_cuda:
            x = torch.nn.functional.linear(x, self.given.weight)
        x = self.asked(x) + self.sliced.weight[0]
        return x


def test_what_the_code_takes() -> None:
    assert weights_taken(Mixer().eval()) == {("given", "weight"), ("sliced", "weight")}


@pytest.mark.parametrize(("parts", "slow", "taken"), [(1, True, False), (2, False, False), (2, True, True)])
def test_conditions_on_a_modules_own_settings(parts: int, slow: bool, taken: bool) -> None:
    assert (("in_parts", "weight") in weights_taken(Mixer(parts, slow).eval())) == taken


def test_what_only_training_takes() -> None:
    module = Mixer()
    assert module.training and ("in_training", "weight") in weights_taken(module)


def test_a_mixer_of_transformers_hands_its_projections_to_a_kernel() -> None:
    """Mamba 2's kernel takes the weight of the output projection in training alone; what it convolves, always."""
    config = config_of(
        "mamba2", hidden_size=64, num_heads=4, head_dim=32, state_size=16, n_groups=1, num_hidden_layers=1
    )
    with torch.device("meta"):
        mixer = AutoModelForCausalLM.from_config(config).eval().get_submodule("backbone.layers.0.mixer")
    taken = weights_taken(mixer)
    assert ("conv1d", "weight") in taken and ("in_proj", "weight") not in taken
