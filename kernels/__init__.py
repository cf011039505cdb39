"""Operators of quantized networks: the specification in plain torch and what runs it."""
