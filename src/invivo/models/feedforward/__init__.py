"""What is computed on every row by itself: MLPs and mixtures of experts."""
