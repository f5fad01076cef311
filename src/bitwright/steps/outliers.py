"""The outlier decision without data: which weights are kept exactly, since one of them would stretch a whole range."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bitwright.core.outlier_rule import OutlierRule


@torch.no_grad()
def outliers(weight: Float[Tensor, "O I"], rule: OutlierRule) -> Bool[Tensor, "O I"] | None:
    """The weights furthest from the mean of all of them; None where there are none.

    By EasyQuant's rule (arXiv 2403.02775, section 3.1) those at least n standard deviations away, or else a share.
    """
    distance = (weight - weight.mean()).abs_()
    if rule.deviations is not None:
        found = distance >= rule.deviations * weight.std(correction=0)
        found &= distance > 0  # all weights alike: no deviation, and none that stands out
    else:
        count = int(rule.share * weight.numel())
        found = torch.zeros_like(weight, dtype=torch.bool)
        found.view(-1)[distance.flatten().topk(count, sorted=False).indices] = True
    return found if found.any() else None
