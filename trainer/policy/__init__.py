"""Policies: base models and their tokenizers, and the LoRA adapters on them."""
