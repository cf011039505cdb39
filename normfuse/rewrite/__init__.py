"""Find, decide, edit: patterns, rules and the driver that applies them."""

from normfuse.rewrite.driver import apply_rules
from normfuse.rewrite.pattern import Match, anything, call, constant
from normfuse.rewrite.rule import Rule

__all__ = ["Match", "Rule", "anything", "apply_rules", "call", "constant"]
