"""What each number of a report means, in a sentence: metrics from their registry, the rest said here."""

from fastgen.core.errors import UserError
from fastgen.evaluation.registry import wanted

TITLES = {
    "nfe": "network calls",
    "seconds_per_sample": "seconds a picture",
    "energy_distance": "energy distance",
    "mmd": "mmd",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "clip": "image-text score",
    "fd_teacher_features": "distance to teacher",
    "mmd_teacher_features": "mmd to teacher",
}
SAID = {
    "nfe": "Network function evaluations for one picture; guidance counts two a step. Lower is faster.",
    "seconds_per_sample": "Seconds for one picture, teacher and student timed in turns on the same machine.",
    "fvd_mini": "Frechet distance to held-out real clips in the features of a small space-time net of our "
    "own. Lower is better; it orders generators of the bundled clips and is not comparable with a published "
    "FVD.",
    "frame_consistency": "How alike neighbouring frames are (cosine of their features); right beside the "
    "real clips' under floor.",
    "first_frame_psnr": "How exactly clips begin with the frame they are shown, dB; at most what the "
    "autoencoder alone repeats.",
    "dynamic_degree": "Pixels that the thing shown moves from frame to frame; right beside the real clips' "
    "under floor. Far below, the clips stand still.",
    "fd_mini": "Frechet distance to held-out real images in the features of a small net of our own. Lower is "
    "better; it orders generators of one image set and is not comparable with a published FID.",
    "energy_distance": "Distance between the student's points and the exact distribution. Lower is better.",
    "modes": "Share of the exact distribution's modes that the samples reach. Higher is better.",
    "agreement": "Share of pictures in which a measuring net finds all that was asked for. Higher is "
    "better; compare with the teacher's.",
    "janus": "Share of views from the side or the back that a measuring net takes for the front. Lower is "
    "better; compare with the teacher's.",
    "forgotten": "Share of the pictures asked for what was to be forgotten that show it. Lower is better.",
    "prompt_recall": "Share of pictures that fit their own prompt best among all prompts of the library, by "
    "a measuring net. Higher is better.",
    "prompt_recall_held_out": "The same of prompts that nothing was trained on. Higher is better.",
    "recall": "Share of real pictures that have a sample near them: how much of the variety is reached. "
    "Higher is better.",
    "precision": "Share of samples that have a real picture near them: how many look real. Higher is better.",
    "mmd": "Kernel distance (MMD x 1000) to real images in the same features as fd_mini; less biased for few "
    "samples. Lower is better.",
    "clip": "How well picture and prompt go together, by the bundled image-text net (x 100). Higher is "
    "better.",
    "fd_teacher_features": "Frechet distance between student and teacher samples in the teacher's own "
    "features: how near the student is, not how good either is. Lower is nearer.",
    "mmd_teacher_features": "Kernel distance between student and teacher samples in the teacher's own "
    "features. Lower is nearer.",
    "diversity_ratio": "Effective number of different samples, as a share of the teacher's; 1 is as varied.",
    "spectrum_gap": "Mean over wavelengths of |ln(power / the teacher's)|, of the pictures' power spectrum. "
    "Lower is nearer.",
    "saturation": "Mean colour saturation.",
    "contrast": "Spread of brightness within a picture.",
    "sharpness": "Strength of edges.",
    "loss": "What this network's optimizer lowers. In adversarial and score methods it need not fall.",
    "lr": "Learning rate of this network's optimizer.",
    "grad_norm": "Length of the gradient before clipping; jumps mean unstable steps.",
    "x_mean": "Mean of the student's samples; far from 0 it drifts in brightness.",
    "x_std": "Standard deviation of the student's samples.",
    "x_spread": "How different the student's samples of one batch are; a fall means collapse.",
    "real_fake_gap": "Mean |D_real - D_fake|: how far teacher and critic disagree about the student's "
    "samples.",
    "critic_error": "How far the critic is off the student's exact score, where that is known.",
    "logit_real": "Discriminator's answer to real images.",
    "logit_fake": "Discriminator's answer to the student's; far below logit_real it is too strong.",
    "dm": "Distribution matching part of the loss.",
    "gan": "Adversarial part of the loss.",
    "disc": "Discriminator's own loss.",
    "denoising": "Critic's error in denoising the student's samples.",
    "untrained": "The student before training: the teacher's weights in the student's few steps.",
    "floor": "What real training images score under the same measurement: the best to be expected.",
}
BETTER = {"lower": "Lower is better.", "higher": "Higher is better.", "none": ""}


def title(key: str) -> str:
    """A number's name for people."""
    return TITLES.get(key, key if key in ("fd_mini", "fvd_mini") else key.replace("_", " "))


def meaning(key: str) -> str:
    """A sentence about a number; empty where nothing is known of it."""
    if key in SAID:
        return SAID[key]
    if key.startswith("agreement_"):
        return f"Share of pictures whose {key.removeprefix('agreement_')} is as asked for. Higher is better."
    if key.endswith("_ratio") and key.removesuffix("_ratio") in SAID:
        return f"{SAID[key.removesuffix('_ratio')].rstrip('.')}, divided by the teacher's; 1 is the same."
    try:
        metric, encoder = wanted(key)[1:]
    except UserError:
        return ""
    seen = f" in the features of {encoder}" if encoder else ""
    what = metric.what[:1].upper() + metric.what[1:]
    return f"{what}{seen}. {BETTER[metric.better]} ({metric.source})".replace("  ", " ").strip()


def direction(key: str) -> str:
    """Which way a number is better: "lower", "higher", or "" where neither is."""
    if (
        key in ("nfe", "seconds_per_sample", "fd_mini", "fvd_mini", "energy_distance", "mmd", "janus")
        or "teacher_features" in key
    ):
        return "lower"
    if key in ("frame_consistency", "dynamic_degree"):
        return ""
    if key in ("precision", "recall", "modes", "clip") or key.startswith(("agreement", "prompt_recall")):
        return "higher"
    try:
        better = wanted(key).metric.better
    except UserError:
        return ""
    return "" if better == "none" else better


def number(value: float | None, key: str) -> str:
    """Shares as percentages, the rest with two to four digits; empty for none."""
    if not isinstance(value, (int, float)):
        return ""
    if key.startswith("agreement") or key in ("recall", "precision", "modes"):
        return f"{100 * value:.1f} %"
    if key == "seconds_per_sample":
        return f"{value:.2g}" if value < 10 else f"{value:.0f}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
