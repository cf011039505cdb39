"""What a model holds and what folding it would do; what an artifact is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Final

from normfuse.artifact import read_artifact, read_whole, verify_artifact
from normfuse.capturing import capture_model
from normfuse.data import Samples
from normfuse.errors import BadInput, UsageError
from normfuse.export.float_tensors import float_tensors
from normfuse.export.lint import TENSORRT_RULES, lint
from normfuse.folding import FoldOptions, fold_captured
from normfuse.graph import Graph
from normfuse.graph.text import operator_name
from normfuse.loading import LoadedModel
from normfuse.manifest import MODEL, REPORT
from normfuse.progress import Progress, Silent
from normfuse.recipe import Recipe

__all__ = ["inspect_artifact", "inspect_model", "lint_engine", "read_report"]

RECIPE: Final = "recipe.toml"

SHOWN: Final = frozenset({"passes", "quantization", "checks", "accuracy_control", "comparison", "verdict"})
"""What a report must hold to be shown as compile shows it."""

LINTED: Final = {"trt": TENSORRT_RULES}
"""The rules of a target, by the name that users give it."""


def inspect_model(
    model: LoadedModel,
    samples: Samples | None = None,
    *,
    options: FoldOptions | None = None,
    with_text: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return inputs, outputs, operators, and the certificate of the folds that would be made, as plain data."""
    graph = capture_model(model, samples=samples)
    folded = fold_captured(graph, samples, options=options or FoldOptions(), progress=progress or Silent())
    return {
        "kind": model.kind.value,
        "sha256": model.sha256,
        "inputs": [f"{spec.name} {list(spec.shape)} {spec.dtype}" for spec in graph.input_specs],
        "outputs": [f"{spec.name} {list(spec.shape)} {spec.dtype}" for spec in graph.output_specs],
        "notes": list(graph.notes),
        "constant_bytes": graph.constant_bytes(),
        "operators": _operators(graph),
        "operators_folded": _operators(folded.graph),
        "certificate": folded.certificate,
        **({"text": folded.graph.text()} if with_text else {}),
    }


def _operators(graph: Graph) -> dict[str, int]:
    names = Counter(operator_name(node.target) for node in graph.nodes if node.op == "call_function")
    return dict(names.most_common())


def inspect_artifact(folder: Path) -> dict[str, Any]:
    """Return an artifact's manifest, its report, and whether its files are the ones that were written.

    Of an engine that was to be of integers alone also the names of the float tensors in it, as they are found now.
    """
    artifact = read_artifact(folder)
    problems = verify_artifact(folder)
    found = {"manifest": dict(artifact.manifest), "problems": problems, "report": artifact.report}
    recipe = folder / RECIPE
    if not problems and recipe.exists() and Recipe.from_toml(recipe.read_text(), where=str(recipe)).integer_only:
        found["float_tensors"] = float_tensors(folder / MODEL)
    return found


def read_report(folder: Path) -> dict[str, Any]:
    """Return the report of an artifact, of a folded one the certificate; all its files are what was written.

    Raises:
        BadInput: it is no artifact, it is damaged, or its report is not of this version of normfuse.
    """
    artifact = read_whole(folder)
    report = artifact.report
    if not artifact.is_folded and (missing := sorted(SHOWN - report.keys())):
        raise BadInput(
            f"the report lacks {', '.join(missing)}",
            where=str(folder / REPORT),
            expected="a report of this version of normfuse",
            hint="compile again",
        )
    return report


def lint_engine(path: Path, target: str) -> dict[str, Any]:
    """Return which rules of a target an artifact's engine, or an ONNX file, breaks.

    Raises:
        UsageError: nobody knows rules of this target.
        BadInput: it is no artifact, and no ONNX file.
    """
    if target not in LINTED:
        raise UsageError(f"there are no rules of {target!r}", where="--lint", expected=", ".join(LINTED))
    if not path.exists():
        raise BadInput(
            "there is no such file",
            where=str(path),
            expected="an artifact or an ONNX file",
            hint="check the path; of a model, compile it first",
        )
    if path.is_dir():
        read_artifact(path)
    found = lint(path / MODEL if path.is_dir() else path, LINTED[target])
    return {"target": target, "rules": len(LINTED[target]), "findings": [each.as_dict() for each in found]}
