"""ODE solvers of the teacher and the few-step sampler of a student."""
