"""What the recorded results rest on: evidence, leaderboard, resolved configs, teacher cards. The metrics
themselves are in fastgen/evaluation.
"""
