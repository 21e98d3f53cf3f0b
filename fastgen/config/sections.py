"""The sections of a run's configuration: typed, their field docstrings the help text."""

from typing import Annotated, Any, Literal, get_origin

import tyro.conf
from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST = 2**63 - 1
"""largest whole number and seed"""
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values never change, field docstrings are the help
    text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _wrap(cls, values):
        """A lone value where a list is meant stands for the list of it."""
        if not isinstance(values, dict):
            return values
        lists = {n for n, f in cls.model_fields.items() if get_origin(f.annotation) is tuple}
        return {
            k: [v] if k in lists and not isinstance(v, (list, tuple, type(None))) else v
            for k, v in values.items()
        }


def check_numbers(section: BaseModel, prefix: str = "") -> None:
    """Raises a ValueError naming the first number, anywhere in a section, that no computation can use: whole
    ones beyond 64 bits, others outside the arithmetic of float32.
    """
    for name in type(section).model_fields:
        value = getattr(section, name)
        key = f"{prefix}{name}"
        for i, item in enumerate(value) if isinstance(value, tuple) else [(None, value)]:
            if isinstance(item, BaseModel):
                check_numbers(item, f"{key}." if i is None else f"{key}.{i}.")
            elif isinstance(item, int) and abs(item) > MOST:
                raise ValueError(f"{key}: found {item}; at most {MOST}, in 64 bits")
            elif isinstance(item, float) and not abs(item) <= 1e30:  # also not a number
                raise ValueError(f"{key}: found {item:g}; at most 1e30, well inside float32")


class TeacherConfig(Section):
    """The slow generator to distil."""

    path: str = "assets:teachers/fashion"
    """diffusers folder, bundled asset (assets:teachers/NAME), exact teacher (analytic:gmm2d-flow) or hub
    id
    """
    guidance: float = Field(1.0, ge=0)
    """classifier-free guidance w of the teacher: D_uncond + w (D_cond - D_uncond); 1 is none"""
    num_steps: int = Field(20, ge=1, le=100_000)
    """network steps the teacher is sampled with where it is compared"""
    prediction: Literal["auto", "eps", "v", "x0", "flow", "edm"] = "auto"
    """native prediction kind; auto reads it off the scheduler, anything else must agree with it"""
    allow_download: bool = False
    """let a hub id be fetched over the network"""
    dtype: Literal["bf16", "fp16"] | None = None
    """precision of frozen weights; null is float32. What is trained (copies, adapters) stays float32"""
    height: int | None = Field(None, ge=1, le=65_536)
    """pixels; null is the size the network was made for"""
    width: int | None = Field(None, ge=1, le=65_536)
    """pixels; null is the size the network was made for"""
    num_frames: int | None = Field(None, ge=1, le=65_536)
    """frames of a video teacher; null is what it was made for"""
    embedded_guidance: float | None = Field(None, ge=0)
    """guidance that the network takes as an input (FLUX.1-dev, SANA-Sprint, LCM); null is the family's"""
    attention: (
        Literal["auto", "native", "math", "flash", "efficient", "cudnn", "flex", "xformers", "sage"] | None
    ) = None
    """attention kernel; null and auto leave PyTorch's choice"""
    vae_tiling: bool = False
    """encode and decode in tiles: less memory at large sizes"""
    vae_slicing: bool = False
    """encode and decode one image at a time"""
    family: Annotated[dict[str, Any] | None, tyro.conf.Suppress] = None
    """declaration of a diffusers denoiser that fastgen does not know (docs/families.md); files only"""
    blueprint: Annotated[dict[str, Any] | None, tyro.conf.Suppress] = None
    """diffusers configs {net, scheduler, info} of an untrained network to build; files only"""
    layout: Annotated[dict[str, Any] | None, tyro.conf.Suppress] = None
    """published configs {net, scheduler, index, extra, codec} of the model at `path`: what --dry_run lays out
    where its weights are not on this disk; files only
    """


class LoraConfig(Section):
    """Low-rank adapter of one role."""

    rank: int = Field(16, ge=1, le=65_536)
    """rank of the update"""
    lora_alpha: float = Field(16, gt=0)
    """scale numerator; the update is multiplied by lora_alpha / rank"""
    use_rslora: bool = False
    """multiply by lora_alpha / sqrt(rank) instead (arXiv 2312.03732)"""
    use_dora: bool = False
    """weight-decomposed adapters (arXiv 2402.09353); refused: LoRA readers drop their magnitudes"""
    target_modules: tuple[str, ...] = ()
    """module-name endings to adapt; empty takes the family's default"""


class StudentConfig(Section):
    """The few-step generator to be."""

    kind: Literal["full", "lora"] = "full"
    """train a copy of the teacher, or an adapter over the frozen teacher"""
    num_steps: int = Field(1, ge=1, le=64)
    """network evaluations per sample; the time list follows the exported scheduler's grid"""
    timesteps: tuple[float, ...] = ()
    """explicit time list in the schedule's units, descending; overrides num_steps, and says where other step
    counts start"""
    sampler: Literal["renoise", "ode", "tcd"] = "renoise"
    """between steps: add fresh noise, continue along the ODE with the predicted noise, or TCD's mixture"""
    gamma: float = Field(0.0, ge=0, le=1)
    """share of fresh noise of the tcd sampler, TCDScheduler's eta: 0 is the ODE, 1 renoises"""
    guidance_embedding: tuple[float, float] | None = None
    """range of guidance w to train a network that takes w as an input; null trains teacher.guidance alone"""
    guidance: float | None = None
    """w that such a network is told in samples and, by default, in its export; null is teacher.guidance"""
    smooth_time: bool = False
    """solve a full student's time embedder anew without fast ripples, for continuous-time methods"""
    sprint: bool = False
    """give a SANA student SANA-Sprint's form (times in [0, 1], w as an input), for SanaSprintPipeline"""
    init: str = ""
    """export folder or LoRA file to start from; empty starts from the teacher"""
    fuse: str = ""
    """export of another student of this teacher, averaged into this one at the end of the run"""
    fuse_weight: float | None = Field(None, ge=0, le=1)
    """this student's share of that average; null is 0.5"""
    lora: LoraConfig = LoraConfig()
    """adapter settings when kind is lora"""
    net: Annotated[dict[str, Any] | None, tyro.conf.Suppress] = None
    """changes to the teacher's network config for an untrained student of another size; files only"""


class CriticConfig(Section):
    """The online fake-score network of distribution-matching methods."""

    kind: Literal["auto", "full", "lora"] = "auto"
    """auto follows the student: an adapter over the shared base for a LoRA student, else a copy"""
    lora: LoraConfig = LoraConfig(rank=32, lora_alpha=32)
    """adapter settings when the critic is a LoRA"""


class DataConfig(Section):
    """Real images and the labels or prompts that go with them."""

    name: str = ""
    """digits, fashion or tinted (bundled); empty with `images` or `prompts`"""
    images: str = ""
    """folder of images (clips for video: animated gif, webp, png, or mp4), captions in metadata.jsonl
    (file_name, text) or .txt side-cars
    """
    control: str = ""
    """folder of control images (edges, depth), in the order of `images`, for teachers with a ControlNet"""
    prompts: str = ""
    """text file with one prompt a line, for methods that need no images"""
    limit: int = Field(0, ge=0)
    """use only the first N examples; 0 means all"""
    on_bad_image: Literal["skip", "error"] = "skip"
    """an unreadable image is named, counted and skipped, or stops the run"""
    cache_dir: str = ""
    """where encoded latents and prompts are kept between runs; empty keeps them in memory"""


class PlayerOptim(Section):
    """Optimizer of one player."""

    lr: float = Field(1e-4, gt=0)
    """learning rate"""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Adam's decay rates"""
    eps: float = Field(1e-8, gt=0)
    """Adam's epsilon"""
    weight_decay: float = Field(0.0, ge=0)
    """decoupled weight decay"""
    name: Literal["adamw", "radam", "adamw8bit"] = "adamw"
    """adamw8bit needs bitsandbytes and CUDA"""
    clip: float = Field(1.0, ge=0)
    """gradient-norm clip; 0 is off"""
    warmup_steps: int = Field(0, ge=0)
    """linear learning-rate warm-up"""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """learning rate after warm-up, over the stage's steps"""


class OptimConfig(Section):
    """One optimizer per player."""

    student: PlayerOptim = PlayerOptim()
    """the student's"""
    critic: PlayerOptim = PlayerOptim()
    """the critic's, discriminator heads included"""
    disc: PlayerOptim = PlayerOptim()
    """a discriminator that is a player of its own"""


class TrainConfig(Section):
    """The loop."""

    max_train_steps: int = Field(300, ge=1)
    """optimizer windows (of a single-stage run)"""
    train_batch_size: int = Field(48, ge=1)
    """samples per process and micro-batch"""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """micro-batches per optimizer window"""
    seed: int = Field(0, ge=0, le=MOST)
    """seed of everything random"""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """autocast of network passes; losses and schedules stay in float32"""
    gradient_checkpointing: bool = False
    """recompute activations at backward: less memory, more time"""
    compile: bool = False
    """torch.compile the networks"""
    ema_decay: tuple[Decay, ...] = (0.995,)
    """averages of the student; the first is validated and exported; empty exports the raw weights"""
    log_steps: int = Field(10, ge=1)
    """steps between lines of metrics.jsonl"""
    validation_steps: int = Field(100, ge=0)
    """steps between sample grids and cheap metrics; 0 is off"""
    checkpointing_steps: int = Field(100, ge=0)
    """steps between checkpoints; 0 keeps only the last"""
    export_dtype: Literal["no", "fp16", "bf16"] = "no"
    """precision of exported weights; no is float32 for students, fp16 for teachers made by sft"""
    checkpoints_total_limit: int = Field(2, ge=1)
    """checkpoints kept"""
    num_threads: int = Field(0, ge=0, le=4096)
    """CPU threads; 0 leaves torch's choice"""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """trackers besides metrics.jsonl, each if installed"""


class EvalConfig(Section):
    """Measuring during and after training."""

    num_samples: int = Field(1000, ge=0)
    """samples for the final table; 0 skips it"""
    teacher_samples: int = Field(0, ge=0)
    """samples of the teacher for the final table; 0 means as many as the student's"""
    student_steps: tuple[Annotated[int, Field(ge=1, le=100_000)], ...] = ()
    """step counts at which the student is measured besides its own; a denoiser trained by sft takes 1, 4,
    20, 50
    """
    validation_samples: int = Field(250, ge=0)
    """samples for the cheap metric during training"""
    grid: int = Field(40, ge=1)
    """images in the validation grid"""
    batch_size: int = Field(100, ge=1)
    """images per sampling batch"""
    seed: int = Field(1234, ge=0, le=MOST)
    """first seed of the samples"""
    keep: Literal["last", "best"] = "last"
    """export the last weights, or those with the best cheap metric during training"""
