"""Attention of the user's own, as one operator: the rule that the guide has for it."""

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from engine import attention_in_products, difference, random_plan, randomised
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.graph import rule
from lightning_prune.graph.rules import RULES
from lightning_prune.planning import CostModel

OPERATOR = "mylib.attention"
PAGE = Path(__file__).parents[2] / "docs" / "write_your_own_criterion.md"


@pytest.fixture
def rule_of_the_guide() -> Iterator[Callable[[], None]]:
    """Return what registers the rule, which is taken out of the table again after the test."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (code,) = [block for block in blocks if f'"{OPERATOR}"' in block]
    yield lambda: exec(code, {"rule": rule})
    RULES.pop(OPERATOR, None)


class OwnAttention(nn.Module):
    """Attention by an operator of its own, between a hidden layer before and one behind it."""

    def __init__(self, attend) -> None:
        super().__init__()
        self.attend = attend
        self.make, self.hidden, self.head = nn.Linear(3, 8), nn.Linear(24, 10), nn.Linear(10, 2)
        self.q, self.k, self.v = nn.Linear(8, 20), nn.Linear(8, 20), nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.make(x)
        heads = [layer(x).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)]
        attended = self.attend(*heads, 0.5).transpose(1, 2).flatten(2)
        return self.head(self.hidden(attended).relu())


def test_attention_is_taught_as_the_guide_says(rule_of_the_guide: Callable[[], None]):
    @torch.library.custom_op("mylib::attention", mutates_args=())
    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return attention_in_products(query * scale, key, value).contiguous()

    attend.register_fake(lambda query, key, value, scale: query.new_empty(*query.shape[:-1], value.shape[-1]))
    torch.manual_seed(0)
    model = randomised(OwnAttention(lambda *given: attend(*given))).double()
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    without = lp.trace(model, x)
    assert "runs mylib.attention, which has no rule" in without.unprunable["q"].reason
    rule_of_the_guide()
    graph = lp.trace(model, x)
    assert [name for name in ("make", "q", "v", "hidden") if name not in graph.groups] == []
    assert (graph.groups["q"].size, graph.groups["v"].size) == (5, 6)
    assert (graph.groups["q"].mask_exact, graph.groups["v"].mask_exact) == (False, True)
    written_out = copy.deepcopy(model)
    written_out.attend = lambda query, key, value, scale: (query @ key.transpose(2, 3) * scale).softmax(-1) @ value
    assert CostModel(graph, "flops").original == CostModel(lp.trace(written_out, x), "flops").original
    assert difference(model, graph, random_plan(graph, exact_only=True), x) <= 1e-9
    plan = random_plan(graph)
    for pruned in (model, written_out):
        lp.prune(pruned, plan)
    torch.testing.assert_close(model(x), written_out(x), rtol=1e-9, atol=1e-9)
