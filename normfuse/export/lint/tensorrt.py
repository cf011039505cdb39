"""The rules of TensorRT (10.13 to 11, TensorRT-RTX 1.7), all of which its documentation or its parser states.

TensorRT-RTX builds without a GPU, and shares parser and rules with TensorRT, but for what is said at a rule.
``tests/export/test_tensorrt_rules.py`` holds a file that keeps and one that breaks each of them, and asks TensorRT-RTX.
"""

from __future__ import annotations

from typing import Final

from normfuse.export.lint.codes import CODE_RULES
from normfuse.export.lint.few_bits import FEW_BIT_RULES
from normfuse.export.lint.operators import OPERATOR_RULES

__all__ = ["TENSORRT_RULES"]

TENSORRT_RULES: Final = (*CODE_RULES, *FEW_BIT_RULES, *OPERATOR_RULES)
