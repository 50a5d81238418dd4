"""Claims agree or they do not."""

from __future__ import annotations

import pytest

from edgewise.core.errors import InvalidValueError
from edgewise.core.recipe import Claim, Recipe
from edgewise.core.report import Report


@pytest.mark.parametrize(("kind", "value", "tolerance", "yes", "no"), [
    ("equal", 5.0, 0.1, 5.05, 5.2), ("at-least", 2.0, 0.1, 1.95, 1.8), ("at-most", 2.0, 0.1, 2.05, 2.2),
    ("order", 0.0, 0.1, 0.2, 0.05), ("trend", -1.0, 0.1, -0.2, 0.2), ("trend", 1.0, 0.1, 0.2, 0.05),
])
def test_agreement(kind, value, tolerance, yes, no):
    claim = Claim("c", "Table 1", "m", value, kind, tolerance)
    assert claim.agrees(yes)
    assert not claim.agrees(no)
    assert not claim.agrees(float("nan"))
    assert Claim.from_json(claim.to_json()) == claim


def test_recipe_json_leaves_run_out():
    recipe = Recipe("arXiv:1", (Claim("c", "w", "m", 1.0),), {"smoke": {"n": 1}}, {"n": "paper"}, 3,
                    lambda settings, seed, ablate: Report(f"{settings['n']} {seed} {ablate}"), "A system")
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe.run(recipe.scales["smoke"], 3, True).title == "1 3 True"
    assert repr(recipe) == "Recipe(arXiv:1: 1 claims, smoke)"


def test_refusals():
    with pytest.raises(InvalidValueError, match="direction"):
        Claim("c", "w", "m", 0.0, "trend")
    with pytest.raises(InvalidValueError, match="tolerance"):
        Claim("c", "w", "m", 0.0, tolerance=-1)
