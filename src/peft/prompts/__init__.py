"""Prompt learning: how trained tokens, or trained keys and values, enter a model. What is trained is in `methods/`."""
