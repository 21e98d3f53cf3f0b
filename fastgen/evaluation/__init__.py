"""Measuring: teacher, student and untrained student on the same requests, sample grids, the report page."""
