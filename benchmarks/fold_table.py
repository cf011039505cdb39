"""``make fold-table``: what `normfuse fold` does to the architectures that people ship, with random weights."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from benchmarks.random_weights import randomized_norms
from normfuse.folding import Folded, fold

ROW: Final = "| {name} | {before} | {after} | {found} | {folded} | {affine} | {norm} | {error:.0e} |"
HEAD: Final = (
    "| model | norms before | norms after | affines found | folded | affines left, and why | norms left, and why "
    "| error, float64 |\n"
    "|---|---|---|---|---|---|---|---|"
)


class Output(nn.Module):
    """One tensor in, one tensor out."""

    def __init__(self, model: nn.Module, name: str, keyword: str) -> None:
        super().__init__()
        self.model, self.name, self.keyword = model, name, keyword

    def forward(self, x: Tensor) -> Tensor:
        """Return the one output."""
        found: Tensor = getattr(self.model(**{self.keyword: x}), self.name)
        return found


def classifier(kind: str, /, image: int = 224, **shape: Any) -> Callable[[], tuple[nn.Module, Tensor]]:
    """Return what builds transformers' image classifier of a kind and an example input."""

    def build() -> tuple[nn.Module, Tensor]:
        import transformers

        configuration = getattr(transformers, f"{kind}Config")(**shape)
        model = getattr(transformers, f"{kind}ForImageClassification")(configuration)
        return Output(model, "logits", "pixel_values"), torch.randn(2, 3, image, image)

    return build


def segformer() -> tuple[nn.Module, Tensor]:
    """Return Segformer-B0 for 150 classes."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    model = SegformerForSemanticSegmentation(SegformerConfig(num_labels=150))
    return Output(model, "logits", "pixel_values"), torch.randn(2, 3, 128, 128)


def bert() -> tuple[nn.Module, Tensor]:
    """Return BERT-base for two classes."""
    from transformers import BertConfig, BertForSequenceClassification

    return Output(BertForSequenceClassification(BertConfig()), "logits", "input_ids"), torch.randint(0, 1000, (2, 64))


B0: Final = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "image_size": 224}
MODELS: Final[dict[str, Callable[[], tuple[nn.Module, Tensor]]]] = {
    "ViT-B/16": classifier("ViT"),
    "DeiT-S": classifier("DeiT", hidden_size=384, num_attention_heads=6, intermediate_size=1536),
    "Swin-T": classifier("Swin"),
    "Swin-v2-T": classifier("Swinv2", image=256, image_size=256, window_size=8),
    "ResNet-50": classifier("ResNet"),
    "ConvNeXt-T": classifier("ConvNext"),
    "BERT-base": bert,
    "Segformer-B0": segformer,
    "MobileNetV2": classifier("MobileNetV2"),
    "EfficientNet-B0": classifier("EfficientNet", **B0),
    "LeViT-128S": classifier("Levit"),
}


def main() -> None:
    """Fold every model and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], help="which ones (all)")
    given = parser.parse_args()
    print(HEAD, flush=True)
    for name in given.models or MODELS:
        torch.manual_seed(0)
        model, example = MODELS[name]()
        folded = fold(randomized_norms(model), [example])
        print(row(name, folded), flush=True)


def row(name: str, folded: Folded) -> str:
    """Return the table's line for one model."""
    found = folded.certificate
    norms = {key: ", ".join(f"{count} {kind}" for kind, count in found["norms"][key].items()) for key in found["norms"]}
    return ROW.format(
        name=name,
        before=norms["before"] or "none",
        after=norms["after"] or "none",
        **found["affines"],
        affine=why(found["left"], "affine"),
        norm=why(found["left"], "norm"),
        error=found["error"]["float64"],
    )


def why(left: list[dict[str, str]], what: str) -> str:
    """Return how many affines or norms are left for each reason."""
    reasons = Counter(each["because"] for each in left if each["what"] == what)
    return "; ".join(f"{count}: {reason}" for reason, count in reasons.most_common()) or "0"


if __name__ == "__main__":
    main()
