"""Metrics and their mathematics. A module with METRICS is listed in evaluation/registry.py; the others hold
what several of them share.
"""
