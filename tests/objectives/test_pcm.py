SHORT = {"grid_steps": 8, "segments": 2, "gan_weight": 0.1, "cond_dropout": 0.5}
STUDENT = {"sampler": "ode", "num_steps": 2}
