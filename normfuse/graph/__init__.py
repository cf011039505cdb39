"""The only intermediate representation: the exported ATen graph, wrapped once."""

from normfuse.graph.capture import capture
from normfuse.graph.graph import Graph
from normfuse.graph.verify import verify

__all__ = ["Graph", "capture", "verify"]
