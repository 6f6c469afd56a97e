"""A torch.compile backend for Mixture-of-Experts inference."""
