SHORT = {"grid_steps": 10, "guidance_range": [1.5, 3.0], "target_decay": 0.5}
