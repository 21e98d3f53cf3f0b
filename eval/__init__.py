"""Measuring generators: distances between feature sets, the bundled measuring nets, speed, leaderboard."""
