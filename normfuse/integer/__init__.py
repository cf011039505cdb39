"""From a float graph with requests to one that computes in integers alone."""
