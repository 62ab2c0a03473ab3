"""ExFlow: affinity-aware expert placement and distributed decode for Mixture-of-Experts models."""

__version__ = "0.1.0"
