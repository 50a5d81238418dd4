"""edgewise convert: another number format, another file format, and what it cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from edgewise.cli import options as shared
from edgewise.cli.frame import current
from edgewise.core.report import Report

EXAMPLES = (
    "edgewise convert smollm2 --out smollm2-q8.gguf --format Q8_0",
    "edgewise convert smollm2 --out smollm2-int4 --format int4/g32/fp16/min --embedding Q8_0",
    "edgewise convert model.gguf --out model-fp16 --dense fp16",
    "edgewise convert path/to/folder --out model.gguf",
    "edgewise convert path/to/gptq-folder --out model-ct --layout compressed-tensors",
)


def command(
    model: shared.Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write: a GGUF file if the name ends in .gguf, else "
                                      "a model folder.", show_default=False)],
    format: Annotated[str, typer.Option("--format", help="Of every matrix: keep, F32, F16, BF16, Q4_0, Q4_1, Q5_0, "
                                        "Q5_1, Q8_0, MXFP4, or a number format such as int4/g32/fp16/min.",
                                        )] = "keep",
    embedding: Annotated[str | None, typer.Option("--embedding", help="Of embedding and output head; by default as the "
                                                  "others.", show_default=False)] = None,
    dense: Annotated[str | None, typer.Option("--dense", help="Write a folder of plain fp16, bf16 or fp32 tensors for "
                                              "other software.", show_default=False)] = None,
    layout: Annotated[str, typer.Option("--layout", help="Whose entries hold the weights of a folder: edgewise, or "
                                        "compressed-tensors for transformers and vLLM.")] = "edgewise",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="Show the error of every tensor.")] = False,
) -> Report:
    """Rewrite a model, rounding to nearest, and report the error of each class, layer and tensor (with --json)."""
    from edgewise.fit.convert import convert

    with shared.loading("converting") as progress:
        report = convert(model, out, format, embedding=embedding, dense=dense, layout=layout,  # type: ignore[arg-type]
                         overwrite=overwrite, progress=progress)
    if current().json or tensors:
        return report
    return replace(report, tables=tuple(table for table in report.tables if table.title != "Tensors"))
