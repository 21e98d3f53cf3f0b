"""Solvers of the teacher's ODE and the few-step sampler of a student."""
