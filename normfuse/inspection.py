"""What a model holds and what folding it would do; what an artifact is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from normfuse.artifact import read_artifact, verify_artifact
from normfuse.compiler import capture_model
from normfuse.data import Samples
from normfuse.graph.text import operator_name
from normfuse.loading import LoadedModel
from normfuse.passes.presets import CANONICAL, FOLD, LOWER
from normfuse.pipeline import Pipeline

__all__ = ["inspect_artifact", "inspect_model"]


def inspect_model(model: LoadedModel, samples: Samples | None = None, *, with_text: bool = False) -> dict[str, Any]:
    """Return inputs, outputs, operators, and every fold that would be made or is refused, as plain data."""
    graph = capture_model(model, samples=samples)
    before = Counter(operator_name(node.target) for node in graph.nodes if node.op == "call_function")
    inputs = [f"{spec.name} {list(spec.shape)} {spec.dtype}" for spec in graph.input_specs]
    outputs = [f"{spec.name} {list(spec.shape)} {spec.dtype}" for spec in graph.output_specs]
    size = graph.constant_bytes()
    reports = Pipeline(phases=(CANONICAL, FOLD, LOWER)).run(graph)
    return {
        "kind": model.kind.value,
        "sha256": model.sha256,
        "inputs": inputs,
        "outputs": outputs,
        "notes": list(graph.notes),
        "constant_bytes": size,
        "operators": dict(before.most_common()),
        "operators_folded": dict(
            Counter(operator_name(node.target) for node in graph.nodes if node.op == "call_function").most_common()
        ),
        "passes": [report.as_dict() for report in reports],
        **({"text": graph.text()} if with_text else {}),
    }


def inspect_artifact(folder: Path) -> dict[str, Any]:
    """Return an artifact's manifest, its report, and whether its files are the ones that were written."""
    artifact = read_artifact(folder)
    return {"manifest": dict(artifact.manifest), "problems": verify_artifact(folder), "report": artifact.report}
