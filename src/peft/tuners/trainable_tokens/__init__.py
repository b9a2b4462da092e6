"""Trained rows of an embedding, beside another method; the method by itself comes with a later release."""
