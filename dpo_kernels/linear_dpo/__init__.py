"""Paired preference loss of a linear head."""
