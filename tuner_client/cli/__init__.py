"""The ``tuner-client`` command; one module for each family of commands."""
