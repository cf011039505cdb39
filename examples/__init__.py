"""Models and data to try normfuse on."""
