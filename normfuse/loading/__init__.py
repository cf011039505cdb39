"""A model file becomes a module or an exported program; nothing in the file runs unless the user says so."""

from normfuse.loading.model import LoadedModel, ModelKind, load_model

__all__ = ["LoadedModel", "ModelKind", "load_model"]
