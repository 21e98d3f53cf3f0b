"""The sections of a run's configuration. The docstrings of the fields are the text of --help."""

from typing import Annotated, Any, Literal

import tyro.conf
from pydantic import Field, model_validator

from fastgen.config.assets import AssetConfig
from fastgen.config.section import MOST, Decay, Section, UserPath


class TeacherConfig(Section):
    """The teacher: the diffusion model that is distilled."""

    path: UserPath = "assets:teachers/fashion"
    """folder of a diffusers model, bundled model (assets:teachers/NAME), analytic teacher with a
    closed form (such as analytic:gmm2d-flow) or hub id (OWNER/NAME)
    """
    guidance: float = Field(default=1.0, ge=0)
    """classifier-free guidance scale w of the teacher, D_uncond + w (D_cond - D_uncond); 1 is no guidance"""
    num_steps: int = Field(default=20, ge=1, le=100_000)
    """sampling steps of the teacher when it is compared with the student"""
    prediction: Literal["auto", "eps", "v", "x0", "flow", "edm"] = "auto"
    """what the network predicts; auto is as in the scheduler's config, with which other values must agree"""
    allow_download: bool = False
    """allow the download of a model given by hub id; false uses the local cache only"""
    dtype: Literal["bf16", "fp16"] | None = None
    """precision of the frozen weights; null is float32. Trained weights (copies, adapters) are float32"""
    quantization: Literal["int8", "fp8", "nf4"] | None = None
    """store the linear layers of the frozen teacher in 8 bits (torchao) or 4 (bitsandbytes): a base for
    adapters that takes a half or a quarter of bf16's memory. Every role must be an adapter
    """
    offload: bool = False
    """keep the large frozen weights of networks and autoencoder in the machine's memory, each layer's on the
    card for its own passes alone; with train.gradient_checkpointing a graph holds those of one block
    """
    height: int | None = Field(default=None, ge=1, le=65_536)
    """image height in pixels; null is the size that the network was trained for"""
    width: int | None = Field(default=None, ge=1, le=65_536)
    """image width in pixels; null is the size that the network was trained for"""
    num_frames: int | None = Field(default=None, ge=1, le=65_536)
    """number of frames of a video teacher; null is what it was trained for"""
    embedded_guidance: float | None = Field(default=None, ge=0)
    """guidance scale for networks that take it as an input (FLUX.1-dev, SANA-Sprint, LCM); null is the
    default of the model family
    """
    attention: (
        Literal["auto", "native", "math", "flash", "efficient", "cudnn", "flex", "xformers", "sage"] | None
    ) = None
    """attention kernel; null, auto and native leave the choice to PyTorch"""
    vae_tiling: bool = False
    """the autoencoder encodes and decodes images in tiles: less memory at large sizes"""
    vae_slicing: bool = False
    """the autoencoder encodes and decodes one image at a time: less memory"""
    family: Annotated[dict[str, Any] | None, tyro.conf.Suppress] = None
    """declaration of a diffusers denoiser that fastgen does not know (docs/families.md); in files only"""
    blueprint: Annotated[dict[str, Any] | None, tyro.conf.Suppress] = None
    """diffusers configs {net, scheduler, info} of an untrained network to start from; in files only"""
    layout: Annotated[dict[str, Any] | None, tyro.conf.Suppress] = None
    """published configs {net, scheduler, index, extra, codec} of the model at `path`, from which --dry_run
    counts memory without its weights; in files only
    """


class LoraConfig(Section):
    """Low-rank adapter (LoRA) of the student or the critic."""

    rank: int = Field(default=16, ge=1, le=65_536)
    """rank of the weight update"""
    lora_alpha: float = Field(default=16, gt=0)
    """the update is multiplied by lora_alpha / rank"""
    use_rslora: bool = False
    """multiply the update by lora_alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732)"""
    use_dora: bool = False
    """weight-decomposed adapters (arXiv 2402.09353); not supported: LoRA loaders ignore their magnitudes"""
    target_modules: tuple[str, ...] = ()
    """endings of the names of the layers to adapt; empty is the default of the model family"""


class GuidanceAdapterConfig(Section):
    """Adapters beside the attention that make the guidance scale an input of the frozen teacher (AGD)."""

    form: Literal["attention", "offset"] = "attention"
    """attention: each place of the image reads w, the time and the condition; offset: one vector of them is
    added everywhere
    """
    width: int = Field(default=64, ge=1, le=65_536)
    """channels inside an adapter"""
    heads: int = Field(default=1, ge=1)
    """heads of the attention form; they must divide the width"""
    multiplier: float = Field(default=0.25, gt=0)
    """the guidance scale is multiplied by it before its Fourier features"""

    @model_validator(mode="after")
    def _whole_heads(self):
        if self.width % self.heads:
            raise ValueError(f"heads: found {self.heads}, which do not divide a width of {self.width}")
        return self


class CausalConfig(Section):
    """A student that makes clips block after block, each attending to those before it (CausVid)."""

    block: int = Field(default=3, ge=1, le=65_536)
    """latent frames that are made at once; they must divide those of a clip"""
    window: int = Field(default=0, ge=0, le=65_536)
    """blocks that attention spans, the own included, and the length of the cache; 0 is a whole clip"""


class StudentConfig(Section):
    """The student: the few-step generator that is trained."""

    kind: Literal["full", "lora", "guidance_adapter"] = "full"
    """train a copy of the teacher (full), a LoRA adapter on the frozen teacher (lora), or adapters that take
    the guidance scale (guidance_adapter)
    """
    num_steps: int = Field(default=1, ge=1, le=64)
    """network evaluations per sample; their times are those of the exported scheduler"""
    timesteps: tuple[float, ...] = ()
    """sampling times in the units of the teacher's noise schedule, descending; overrides num_steps. Its first
    time is also that of other step counts
    """
    sampler: Literal["renoise", "ode", "tcd"] = "renoise"
    """between two steps add fresh noise (renoise), use the predicted noise (ode), or mix both (tcd)"""
    gamma: float = Field(default=0.0, ge=0, le=1)
    """share of fresh noise of the tcd sampler (eta of TCDScheduler): 0 is the same as ode, 1 as renoise"""
    guidance_embedding: tuple[float, float] | None = None
    """[low, high] of the guidance scales for a student that takes the scale as an input; null trains it for
    teacher.guidance only
    """
    guidance: float | None = None
    """guidance scale of samples of such a student, and the default of its export; null is teacher.guidance"""
    fidelity: float | None = Field(default=None, ge=0, le=1)
    """of a student with that knob (oftsr): where its samples lie between what looks real (0) and what is
    faithful (1), and the default of its export; null is the least that is trained
    """
    smooth_time: bool = False
    """refit the time embedding of a full student without high frequencies, for continuous-time methods"""
    sprint: bool = False
    """convert a SANA student to the inputs of SanaSprintPipeline: times in [0, 1] and the guidance scale"""
    trained: tuple[str, ...] = ()
    """patterns of the parameters that a full student trains, such as *motion_modules*; empty is all"""
    init: UserPath = ""
    """export folder or LoRA file of a student to start from; empty starts from the teacher"""
    fuse: UserPath = ""
    """export of another student of this teacher, to be averaged with this one at the end of the run"""
    fuse_weight: float | None = Field(default=None, ge=0, le=1)
    """weight of this student in that average; null is 0.5"""
    lora: LoraConfig = LoraConfig()
    """settings of the adapter if kind is lora"""
    guidance_adapter: GuidanceAdapterConfig | None = None
    """settings of the adapters if kind is guidance_adapter; null is their defaults"""
    causal: CausalConfig | None = None
    """make clips block after block over a cache of those before; null makes all of a sample at once"""
    asset: AssetConfig | None = None
    """3D scenes that are rendered in the place of a network; trained on data.views"""
    net: Annotated[dict[str, Any] | None, tyro.conf.Suppress] = None
    """changes to the teacher's network config, for an untrained student of another size; in files only"""

    def guidance_of_samples(self, teacher: float) -> float:
        """The scale that a student with an input for it is sampled with, given teacher.guidance."""
        return teacher if self.guidance is None else self.guidance


class CriticConfig(Section):
    """The online fake-score network of distribution-matching methods."""

    kind: Literal["auto", "full", "lora"] = "auto"
    """full: a copy of the teacher; lora: an adapter on the frozen teacher; auto: as student.kind"""
    lora: LoraConfig = LoraConfig(rank=32, lora_alpha=32)
    """settings of the adapter if the critic is one"""


class PlayerOptim(Section):
    """Optimizer of one trained network (student, critic or discriminator)."""

    lr: float = Field(default=1e-4, gt=0)
    """learning rate"""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """decay rates of Adam's moments"""
    eps: float = Field(default=1e-8, gt=0)
    """epsilon of Adam"""
    weight_decay: float = Field(default=0.0, ge=0)
    """decoupled weight decay"""
    name: Literal["adamw", "radam", "adamw8bit", "adamw8bit_torchao"] = "adamw"
    """optimizer; adamw8bit keeps its states in 8 bits and needs the package bitsandbytes and a CUDA GPU,
    adamw8bit_torchao the package torchao and any device
    """
    fused: bool = False
    """update all weights in one kernel (adamw): faster, and rounded otherwise"""
    clip: float = Field(default=1.0, ge=0)
    """maximal norm of the gradient, larger ones are scaled down; 0 is off"""
    warmup_steps: int = Field(default=0, ge=0)
    """steps over which the learning rate rises linearly from 0"""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """learning rate after the warm-up; cosine and linear decay to 0 at the end of the stage"""

    @model_validator(mode="after")
    def _fused_adam(self):
        if self.fused and self.name != "adamw":
            raise ValueError(f"fused: found true with {self.name}; leave it out, or use adamw")
        return self


class OptimConfig(Section):
    """The optimizers, one per trained network."""

    student: PlayerOptim = PlayerOptim()
    """optimizer of the student"""
    critic: PlayerOptim = PlayerOptim()
    """optimizer of the critic and its discriminator heads"""
    disc: PlayerOptim = PlayerOptim()
    """optimizer of a discriminator that is not part of the critic"""


class TrainConfig(Section):
    """The training loop."""

    max_train_steps: int = Field(default=300, ge=1)
    """training steps of a run with one stage; each ends in optimizer updates"""
    train_batch_size: int = Field(default=48, ge=1)
    """samples per micro-batch and process"""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """micro-batches per training step"""
    seed: int = Field(default=0, ge=0, le=MOST)
    """seed of all random numbers in training"""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """precision of the networks' computations (autocast); losses and noise schedules are in float32"""
    gradient_checkpointing: bool | Literal["selective"] = False
    """recompute the activations of each block in the backward pass: less memory, more time; selective keeps
    what products, convolutions and attention gave, and recomputes what is cheap
    """
    compile: bool = False
    """compile the networks with torch.compile"""
    compile_blocks: bool = False
    """compile each kind of repeated block once, not whole networks: starts in a fraction of the time"""
    channels_last: bool = False
    """keep the weights of convolutions over images in channels-last order, that of tensor cores; exports are
    as without it
    """
    ema_decay: tuple[Decay, ...] = (0.995,)
    """decay rates of moving averages of the student's weights; the first average is validated and exported;
    an empty list exports the trained weights themselves
    """
    log_steps: int = Field(default=10, ge=1)
    """training steps between lines of metrics.jsonl"""
    validation_steps: int = Field(default=100, ge=0)
    """training steps between sample grids with validation metrics, which the end of each stage has too; 0 is
    off
    """
    checkpointing_steps: int = Field(default=100, ge=0)
    """training steps between checkpoints; 0 writes only the last"""
    export_dtype: Literal["no", "fp16", "bf16"] = "no"
    """precision of exported weights; no is float32 for students, and fp16 for teachers trained by sft"""
    checkpoints_total_limit: int = Field(default=2, ge=1)
    """number of checkpoints that are kept, the latest"""
    sharding: Literal["fsdp"] | None = None
    """over several processes, keep a part of every network on each (torch's FSDP2); null keeps them whole"""
    shard_group: int | None = Field(default=None, ge=1)
    """with sharding: how many processes hold one copy of the networks between them, e.g. those of a machine;
    each group of them holds a copy (HSDP); null spreads one copy over all
    """
    context_parallel: int | None = Field(default=None, ge=2)
    """over several processes: how many of them compute one sample together, each with a part of its tokens
    (long clips, large pictures); the batch is that of such a group; null gives each process its own samples
    """
    sharded_checkpoints: bool = False
    """with sharding: each process writes its parts into a file of every checkpoint, on a disk that all see"""
    async_checkpoints: bool = False
    """write checkpoints from a copy in memory while training goes on"""
    num_threads: int = Field(default=0, ge=0, le=4096)
    """CPU threads of PyTorch; 0 is its own default, at most the CPUs that affinity and the container allow"""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """experiment trackers besides metrics.jsonl; each needs its package"""


class EvalConfig(Section):
    """Evaluation during and after training."""

    num_samples: int = Field(default=1000, ge=0)
    """student samples of the final evaluation; 0 skips it. The default is 100 where eval.metrics is empty and
    the teacher is none of a bundled set, or the data are your own
    """
    teacher_samples: int = Field(default=0, ge=0)
    """teacher samples of the final evaluation; 0 is as many as the student's"""
    remeasure_teacher: bool = False
    """measure a bundled teacher again where its numbers for this very protocol are on record"""
    student_steps: tuple[Annotated[int, Field(ge=1, le=100_000)], ...] = ()
    """further step counts with which the student is evaluated; empty is none, or 1, 4, 20 and 50 for a
    denoiser trained by sft
    """
    validation_samples: int = Field(default=250, ge=0)
    """samples of the validation metric during training"""
    grid: int = Field(default=40, ge=1)
    """images in the sample grid"""
    batch_size: int = Field(default=100, ge=1)
    """images per batch when sampling"""
    seed: int = Field(default=1234, ge=0, le=MOST)
    """seed of the first sample; the next ones count up"""
    metrics: tuple[str, ...] = ()
    """metrics of the samples, by name (`fastgen-eval metrics` lists them): during training on the validation
    samples, and at the end
    """
    weights: Annotated[dict[str, UserPath], tyro.conf.Suppress] = Field(default_factory=dict)
    """local files or folders of the networks that these metrics look through, by name, or
    package.module:function for a network of your own; in files only
    """
    against: UserPath = ""
    """reference images of these metrics, or a statistics file (.npz); empty is data.images, or the held-out
    images of data.name
    """
    keep_by: str = ""
    """validation metric by which `keep: best` chooses; empty is the first of eval.metrics that has a better
    and a worse, or the metric of a bundled teacher
    """
    keep: Literal["last", "best"] = "last"
    """export the last weights, or those with the best validation metric during training"""

    @model_validator(mode="after")
    def _check_counts(self):
        """Distances between distributions need two samples; better refused now than after training."""
        for name in ("num_samples", "teacher_samples", "validation_samples"):
            if getattr(self, name) == 1 and not (name == "validation_samples" and self.grid > 1):
                raise ValueError(f"{name}: found 1; use 2 samples or more, or 0 to turn it off")
        return self
