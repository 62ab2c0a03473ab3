"""The commands of `exflow`, one thin file each; heavy imports stay inside the functions."""
