"""AdaMSS: several small subspaces of the weight's principal directions, and a budget of those that stay trainable."""
