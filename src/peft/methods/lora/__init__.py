"""LoRA: low-rank updates of the weight."""
