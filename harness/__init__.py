"""Multimodal encoder embeddings from vLLM: the plugin that captures them and the harness that proves them right."""

__version__ = "0.1.0"
