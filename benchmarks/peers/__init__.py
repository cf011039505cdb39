"""Peers, run as installed packages side by side with normfuse."""
