"""What an ONNX file breaks of the rules of a builder, before it is built."""

from normfuse.export.lint.rule import Finding, Level, LintRule, lint
from normfuse.export.lint.tensorrt import TENSORRT_RULES

__all__ = ["TENSORRT_RULES", "Finding", "Level", "LintRule", "lint"]
