"""Verifiers: from a response's text to a reward."""
