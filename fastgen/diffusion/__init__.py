"""The mathematics: noise schedules, losses, divergences, reparametrizations. Tensors in, tensors out."""
