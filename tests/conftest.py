"""Settings of all tests."""

from hypothesis import settings

# Machines are noisy: time limits belong to pytest-timeout, not to single examples.
settings.register_profile("exflow", deadline=None, print_blob=True, derandomize=True)
settings.load_profile("exflow")
