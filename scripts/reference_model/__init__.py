"""How the reference models in `exflow/assets` are trained."""
