"""Metrics on a real network and real photographs that packages carry; skipped where they are missing."""
