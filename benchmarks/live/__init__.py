"""What live tasks cost and whether they disturb anybody, measured on a real Triton."""
