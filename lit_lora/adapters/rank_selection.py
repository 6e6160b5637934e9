"""Which rank-one components of an adapter fit a budget."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_lora.errors import UserError


def select_components(scores: list[Tensor], costs: list[float], budget: float, min_rank: int = 1) -> list[Tensor]:
    """Choose the components with the most importance for their cost that fit a budget.

    The ``min_rank`` best components of every layer are kept in any case. All others compete across the layers by their score
    divided by their cost; from the first that does not fit the rest is removed.

    Args:
        scores: Importance of the components of each layer, float ``(r,)`` on the CPU.
        costs: Cost of one component of each layer.
        budget: Bound of the total cost.
        min_rank: Least number of components of a layer; a layer with fewer keeps all.

    Returns:
        For each layer the indices of the components to keep, sorted, int64.

    Raises:
        UserError: If the budget is below the cost of ``min_rank`` components in every layer.
    """
    least = sum(cost * min(min_rank, len(values)) for values, cost in zip(scores, costs, strict=True))
    if least > budget:
        raise UserError(
            f"the budget of {budget:,.0f} is below {least:,.0f}, the cost of min_rank={min_rank} in each of the {len(scores)} "
            f"layers; raise the budget, or adapt fewer layers with target_modules"
        )
    worth = torch.cat([values.double() / cost for values, cost in zip(scores, costs, strict=True)])
    cost_of = torch.cat(
        [torch.full((len(values),), float(cost)) for values, cost in zip(scores, costs, strict=True)]
    ).double()
    firsts = torch.tensor([0, *[len(values) for values in scores]]).cumsum(0)
    kept = torch.zeros(len(worth), dtype=torch.bool)
    for first, values in zip(firsts, scores, strict=False):
        best = values.argsort(descending=True, stable=True)[:min_rank]
        kept[first + best] = True
    others = worth.masked_fill(kept, -torch.inf).argsort(descending=True, stable=True)[: int((~kept).sum())]
    spent = cost_of[others].cumsum(0) + cost_of[kept].sum()
    kept[others[spent <= budget]] = True
    return [
        kept[first : first + len(values)].nonzero().flatten() for first, values in zip(firsts, scores, strict=False)
    ]
