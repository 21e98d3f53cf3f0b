"""The mathematics: noise schedules, losses, divergences, reparametrizations. Functions of tensors only."""
