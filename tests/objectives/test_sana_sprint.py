SHORT = {"scm": {"warmup_steps": 2, "sigma_data": 1.0}, "gan": {"disc_depths": 2}}
"""settings of the contract battery"""
