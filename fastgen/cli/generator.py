"""A contender of sample.py: a student in its few steps, or a teacher in its many."""

from contextlib import contextmanager

from fastgen.core.errors import warn


class Generator:
    """One contender: a student with its times, or a teacher with its steps and guidance."""

    def __init__(self, loaded, steps: int, guidance: float, null: dict, nasa_scale: float = 0.0):
        """nasa_scale: subtract the attention to `null`, a student's negative prompt (negative_prompts.py)."""
        from fastgen.roles.roles import Student

        self.nasa_scale = nasa_scale
        self.role, self.codec, self.null = loaded.role, loaded.codec, null
        self.guidance, self.is_student = guidance, isinstance(self.role, Student)
        if isinstance(self.role, Student):
            self.role = _with_flags(self.role, steps, guidance)
            self.steps = len(self.role.times)
        else:
            self.steps = steps or 20

    @property
    def name(self) -> str:
        return f"{'student' if self.is_student else 'teacher'}, {self.steps} step{'s' * (self.steps > 1)}"

    @property
    def nfe(self) -> int:
        """Network evaluations per image; guidance takes two a step."""
        if self.is_student:
            return self.role.nfe
        return self.steps * (1 if self.guidance in (0, 1) or not self.null else 2)

    def __call__(self, cond: dict, seeds: list[int], device):
        """Images [B, C, H, W] in [0, 1]."""
        return self._decoded(self.drawn(cond, seeds, device))

    def drawn(self, cond: dict, seeds: list[int], device):
        """x0 [B, ...], one seed each."""
        from fastgen.sampling.solvers import ImageNoise, sample_student, sample_teacher

        if self.is_student:
            with self.negative():
                return sample_student(self.role, seeds, self.codec.shape, cond, device)
        noise = ImageNoise(seeds, self.codec.shape, device).first
        uncond = cond | {k: v.expand(len(seeds), *v.shape[1:]) for k, v in self.null.items()}
        w = self.guidance if self.null else 1.0
        return sample_teacher(self.role, noise, cond, uncond, self.steps, w)

    def _decoded(self, x0):
        """Pictures of denoised samples; NotFinite instead of black ones."""
        from fastgen.sampling.solvers import check_finite

        images = self.codec.decode(x0)
        check_finite(f"samples of the {self.name}", x0, images)
        return images

    @contextmanager
    def negative(self):
        """The student's networks under NASA while it draws; a LoRA's teacher shares them afterwards."""
        from fastgen.networks import negative_prompts

        nets = [r.backbone.net for r in self.role.members] if self.nasa_scale else []
        states, mask = (self.null.get(f"encoder_{k}") for k in ("hidden_states", "attention_mask"))
        for net in nets:
            negative_prompts.attach(net, states, self.nasa_scale, mask)
        try:
            yield
        finally:
            for net in nets:
                negative_prompts.remove(net)


def _with_flags(student, steps: int, guidance: float):
    """The student in `steps` steps (0: its own), at this scale where it takes one; warns outside what it was
    trained for.
    """
    own, spec = len(student.times), student.spec
    if steps not in (0, own):
        if not spec.grid:
            warn(f"--steps: trained for {own}, sampling with {steps}")
        student = student.with_steps(steps)
    if spec.guidance_range and not spec.steps_as_guidance:
        low, high = spec.guidance_range
        if not low <= guidance <= high:
            warn(f"--guidance: trained for {low:g} to {high:g}, sampling with {guidance:g}")
        student = student.with_guidance(guidance)
    return student
