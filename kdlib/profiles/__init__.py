"""Profiles: YAML files with the parameters of a study."""
