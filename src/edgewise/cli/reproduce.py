"""edgewise reproduce: run the recipe of a published system and judge its claims."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from edgewise.cli.frame import current
from edgewise.core.errors import InvalidValueError, notice
from edgewise.core.report import Report, Table

EXAMPLES = (
    "edgewise reproduce --list",
    "edgewise reproduce melt",
    "edgewise reproduce mlx-transformers --scale small --ablate --out docs/results",
)


def command(
    slug: Annotated[str | None, typer.Argument(metavar="SLUG", help="The recipe, by the name of its system.",
                                               show_default=False)] = None,
    scale: Annotated[str, typer.Option("--scale", help="smoke: seconds, shows that the mechanism acts. small: minutes, "
                                       "the verdicts come from it. paper: the published setting.")] = "smoke",
    seed: Annotated[int | None, typer.Option("--seed", help="The first seed; by default the recipe's.",
                                             show_default=False)] = None,
    ablate: Annotated[bool, typer.Option("--ablate", help="Measure with the mechanism switched off as well.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Write SLUG.json and SLUG.md into this directory; by "
                                             "default docs/results, where the current directory has one.",
                                             show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume/--afresh", help="Take up what an interrupted run left.")] = True,
    listing: Annotated[bool, typer.Option("--list", help="Show every recipe with its claims and scales.")] = False,
) -> Report:
    """Run a published system's recipe and compare what it claims with what is measured."""
    from edgewise.papers import recipe_of, reproduce, slugs

    if listing:
        rows = [(name, recipe.title, recipe.paper, len(recipe.claims), ", ".join(recipe.scales))
                for name in slugs() for recipe in (recipe_of(name),)]
        return Report("Recipes", tables=(Table("Recipes", ("recipe", "system", "paper", "claims", "scales"),
                                               tuple(rows)),))
    if slug is None:
        raise InvalidValueError(f"give a recipe: {', '.join(slugs())}; --list shows their claims")
    if scale not in ("smoke", "small", "paper"):
        raise InvalidValueError(f"--scale is smoke, small or paper; given {scale!r}")
    if out is None:
        usual = Path("docs/results")
        if usual.is_dir():
            out = usual
        else:
            notice("info", "nothing is written: the current directory has no docs/results; --out names a directory",
                   where="reproduce")
    with current().progress("reproduce") as update:
        report: Report = reproduce(slug, scale=cast(Literal["smoke", "small", "paper"], scale), seed=seed,
                                   ablate=ablate, out=out, resume=resume,
                                   progress=lambda what, done, total: update(done, total, what))
    return report
