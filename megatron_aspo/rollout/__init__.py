"""Sampling of scored responses from the policy."""
