"""What a model holds and what folding it would do; what an artifact is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from normfuse.artifact import read_artifact, verify_artifact
from normfuse.capturing import capture_model
from normfuse.data import Samples
from normfuse.folding import FoldOptions, fold_captured
from normfuse.graph import Graph
from normfuse.graph.text import operator_name
from normfuse.loading import LoadedModel
from normfuse.progress import Progress, Silent

__all__ = ["inspect_artifact", "inspect_model"]


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
    """Return an artifact's manifest, its report, and whether its files are the ones that were written."""
    artifact = read_artifact(folder)
    return {"manifest": dict(artifact.manifest), "problems": verify_artifact(folder), "report": artifact.report}
