"""Verifiers of responses, and the rewards made of their scores. Judging processes import parts of it, so this imports
none."""
