"""Measures engines fairly: alone in their processes, in turns, on random inputs."""
