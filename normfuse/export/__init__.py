"""From a graph to files that engines run."""
