"""Find, decide, edit: patterns, rules and the driver that applies them; how affines move and what takes them in."""

from normfuse.rewrite.changes import describe_fold
from normfuse.rewrite.driver import Audit, apply_rules
from normfuse.rewrite.pattern import Match, anything, call, constant
from normfuse.rewrite.rule import Rule

__all__ = ["Audit", "Match", "Rule", "anything", "apply_rules", "call", "constant", "describe_fold"]
