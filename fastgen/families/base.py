"""The declaration of a family of diffusers denoisers: how its networks and pipelines differ from others.

A family sets attributes; most need no method. `call` has the same form for all networks: x is the plain
latent [B, C, h, w] ([B, C, f, h, w] for video), time is the network's own time argument, and the result is
the network's native prediction, shaped like x. Packing into tokens, position ids, masks, the sign and the
choice of output channels are hidden inside it.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastgen.core.batch import Cond
from fastgen.core.errors import UserError
from fastgen.core.patterns import matches
from fastgen.diffusion.schedules import Schedule
from fastgen.families.parts import (
    DiffusersModel,
    Parts,
    channel_statistics,
    dynamic_shift,
    fold_tokens,
    has_channel_statistics,
    one_channel_wider,
    part_name,
    patch_of,
)


class Family:
    """One declaration. Instances are listed in FAMILIES of their module, the most specific first."""

    # -- identity -------------------------------------------------------------------------------------------
    name: str
    net_class: str
    """diffusers class of the denoiser"""
    component: str = "transformer"
    """its folder inside a pipeline"""
    extra: tuple[str, ...] = ()
    """folders of further networks that are part of the denoiser (see `Parts`), where the pipeline has them"""
    pipelines: tuple[str, ...] = ()
    """pipeline classes that contain it; an export of a model without a source folder names the first"""

    # -- the call -------------------------------------------------------------------------------------------
    sample_key: str = "hidden_states"
    time_key: str = "timestep"
    keys: tuple[str, ...] = ("encoder_hidden_states",)
    """cond entries passed to the network as keyword arguments, floats in the network's dtype"""
    flow_time: Literal["t1000", "unit", "reversed"] = "t1000"
    """the network's time argument at time t of a rectified flow: 1000 t, t or 1 - t"""
    edm_time: float = 0.25
    """factor of the network's time argument under an EDM schedule, edm_time * ln(sigma)"""
    sign: int = 1
    """-1 where the network's output is the negative of the scheduler's prediction"""
    schedules: tuple[str, ...] = ("Flow",)
    """noise schedules that such networks are trained with; a scheduler of another kind is a user error"""
    boundary: bool = False
    """EDM preconditioning with the boundary condition of consistency models, D(x, sigma_min) = x"""

    # -- conditions -----------------------------------------------------------------------------------------
    kind: Literal["text", "labels", "scans", "pictures"] = "text"
    """conditioned on prompts (and images), on class labels (or unconditional), on scans to complete, or on
    pictures to restore
    """
    begins_at_noise: bool = True
    """whether noise alone is at the far end of the paths from the data; see `source`"""
    max_length: int | None = None
    """number of tokens of an encoded prompt; None is the tokenizer's own limit"""
    tokenizer: str = "tokenizer"
    """name of the pipeline's tokenizer whose length limits a prompt"""
    default_guidance: float | None = None
    """default of the guidance scale that the network takes as an input; None if it has no such input"""
    takes_text: bool = True
    """whether its pipeline takes a prompt"""
    label_key: str = ""
    """keyword argument of its pipeline for the class; empty if no pipeline takes classes"""
    needs_image: bool = False
    """cond contains an image (first frame, control image) besides the text"""
    needs_last_image: bool = False
    """and the last frame beside the first: such images are [B, 3, 2, H, W]"""

    # -- sizes ----------------------------------------------------------------------------------------------
    factor: int = 8
    """image pixels per latent pixel, along each side, unless the pipeline's autoencoder states another"""
    folded: int = 1
    """side of the square of autoencoder latents that becomes the channels of one pixel of x0"""
    temporal: int = 0
    """video frames per latent frame (frames = temporal * k + 1); 0 for images"""
    frame_chunk: int = 1
    """frames after the first that its autoencoder encodes at a time; what is left of them it drops"""
    has_size: bool = True
    """whether the user can choose the height and width of a sample"""
    divisor: int = 1
    """the height and width of a latent must be multiples of this"""
    square: bool = False
    """whether height and width must be equal"""
    default_grid: tuple[int, ...] = ()
    """latent (h, w) or (f, h, w) if neither the user nor the network's config states it"""

    latent_statistics: Literal["none", "shift", "channels"] = "shift"
    """what the pipeline applies of its autoencoder's config besides scaling_factor: nothing, shift_factor, or
    latents_mean and latents_std where both are set
    """
    decoder: str = "vae"
    """name of the pipeline's component that decodes latents"""
    views: bool = False
    """whether a decoded sample is F rendered views around an object, [B, C, F, H, W]"""

    # -- students -------------------------------------------------------------------------------------------
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """endings of the names of the modules that a LoRA student adapts by default"""
    lora_parts: tuple[str, ...] = ()
    """component folders of the networks of `Parts` that LoRA adapts; empty is the first one only"""
    final_layers: tuple[str, ...] = ()
    """patterns of full names of the input, time and output layers, which the default LoRA targets leave out
    and a user's must name in full
    """
    added_layers: tuple[str, ...] = ()
    """patterns of layers that the image network lacks which it may begin as (`teacher.blueprint.start`)"""
    added_at_zero: tuple[str, ...] = ()
    """those of them that then begin at zero, so that it makes of each frame what that network makes of it"""
    frame_times: bool = False
    """whether each frame may have a time of its own, [B, F], and attention may go block by block"""
    lora_loader: bool = True
    """whether the pipeline has load_lora_weights; otherwise `export.lora.load_lora_into` loads the file"""
    kohya_prefix: str | None = None
    """prefix of layer names in LoRA files of the kohya format; None if diffusers does not read them"""
    kohya_layers: tuple[str, ...] = ("*",)
    """patterns of the layers that diffusers reads from kohya files; none is written if others are adapted"""
    unreached: dict[str, str] = {}
    """patterns of parameters that get no gradient ({last} is the index of the last block), and the reason"""
    tap_output: int = 0
    """index of the image stream among the outputs of a tapped block that returns several"""

    time_layers: tuple[str, str] = ("time_proj", "time_embedding")
    """names of the sinusoidal time embedding and of the two-layer embedder that follows it"""
    input_layer: str = "conv_in"
    """name of the convolution that reads the latent; a second time becomes one more input channel of it"""
    guidance_layers: tuple[str, ...] = ()
    """names of the layers that `add_guidance` creates; a LoRA student adapts them too"""
    guidance_option: str = ""
    """setting of the student section that `add_guidance` requires, as only that form has a pipeline that
    passes the guidance scale
    """

    # -- the exported pipeline ------------------------------------------------------------------------------
    call_arguments: dict[str, Any] = {}
    """keyword arguments with which a pipeline call computes what fastgen does"""
    supports_guidance: bool = True
    """whether the pipeline has classifier-free guidance"""
    guidance_keeps_norm: bool = False
    """whether the pipeline rescales the guided prediction to the norm of the conditional one"""
    guidance_off: dict[str, float] = {"guidance_scale": 1.0}
    """keyword arguments that switch the pipeline's own guidance off"""
    index_extra: dict[str, Any] = {}
    """entries of an exported model_index.json besides the components"""
    default_sigmas: bool = False
    """whether the pipeline passes the times 1 - k/N to the scheduler, which then only applies `shift`"""

    @property
    def pipeline(self) -> str:
        """Name of the default pipeline class; empty if there is none."""
        return self.pipelines[0] if self.pipelines else ""

    def matches(self, index: dict, config: dict) -> bool:
        """Whether model_index.json and the config.json of a denoiser of net_class are this family's."""
        return True

    # -- the call -------------------------------------------------------------------------------------------
    def call(self, net: DiffusersModel, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """Native prediction, shaped like x, at the network's own time [B]."""
        inputs = {self.sample_key: x, self.time_key: time, **self.inputs(x, cond), "return_dict": False}
        return self.sign * net(**inputs)[0][:, : x.shape[1]]

    def inputs(self, x: Tensor, cond: Cond) -> dict[str, Any]:
        """Keyword arguments of the network: the entries of cond in `keys`, floats in x's dtype."""
        found = {k: cond[k] for k in self.keys if k in cond}
        return {k: v.to(x.dtype) if v.is_floating_point() else v for k, v in found.items()}

    # -- conditions -----------------------------------------------------------------------------------------
    def cond_shapes(self, net: DiffusersModel, codec) -> dict[str, tuple[int, ...]]:
        """Shape of one row of each cond entry, or (shape, dtype), without a text encoder (for --dry_run)."""
        raise NotImplementedError(f"{self.name} declares no cond_shapes")

    def encode(self, codec, prompts: list[str]) -> Cond:
        """Prompts encoded by the encode_prompt of the pipeline (codec.pipe), in float32."""
        raise NotImplementedError(f"{self.name} declares no encode")

    def null(self, codec) -> Cond:
        """One row: the null condition of the pipeline's guidance without a negative prompt."""
        return self.encode(codec, [""])

    def encode_image(self, codec, images: Tensor) -> Cond:
        """The cond entries of images [B, 3, H, W] in [-1, 1]."""
        raise NotImplementedError(f"{self.name} takes no image")

    def has_null(self, net: DiffusersModel, classes: int) -> bool:
        """Whether a class-conditional network has an embedding of the null class, after the last class."""
        return 0 < classes < (net.config.get("num_class_embeds") or 0)

    def nulled(self, cond: Cond) -> Cond:
        """The null condition that the pipeline derives from one with an image; most keep the image."""
        return cond

    def guidance_embedded(self, net: DiffusersModel) -> bool:
        """Whether the network takes the guidance scale as an input."""
        return self.default_guidance is not None

    def add_guidance(self, net: DiffusersModel) -> DiffusersModel:
        """A network that also takes cond["guidance"] [B]; it computes the same function, as the new layers
        end in zeros.
        """
        raise UserError(
            "student.guidance_embedding",
            f"{self.net_class} has no input for the guidance scale",
            "remove the setting; the student then learns the one scale teacher.guidance",
        )

    def add_second_time(self, net: DiffusersModel) -> DiffusersModel:
        """A network that also takes a second time, as one more input channel; it computes the same function,
        as the new weights are zero.
        """
        wider = one_channel_wider(net, self.input_layer)
        if wider is None:
            found = f"the method needs a network with two times, which {self.net_class} cannot be given"
            raise UserError("objective.name", found, "choose a method whose network takes one time")
        return wider

    def start_noise(self, info: dict) -> float:
        """Share of noise where sampling begins, of what fastgen.json says of a model; all of it is noise."""
        return 1.0

    def source(self, noise: Tensor, cond: Cond, start_noise: float) -> Tensor:
        """The far end [B, ...] of the paths x_t = alpha x0 + sigma source, given unit noise: where sampling
        begins. A family overrides it whose paths begin elsewhere than at noise; start_noise is the share of
        noise that is mixed into it there.
        """
        return noise

    # -- latents --------------------------------------------------------------------------------------------
    def channels(self, net: DiffusersModel) -> int:
        """Channels of x0."""
        return net.config.in_channels

    def grid(self, net: DiffusersModel) -> tuple[int, ...]:
        """Latent (h, w) or (f, h, w) that the network was trained for."""
        size = net.config.get("sample_size")
        if size is None:
            return self.default_grid
        return tuple(size) if isinstance(size, (list, tuple)) else (size, size)

    def frame_patch(self, net: DiffusersModel) -> int:
        """Latent frames of a token, of which a clip has whole ones."""
        size = net.config.get("patch_size")
        three = isinstance(size, (list, tuple)) and len(size) == 3
        return size[0] if three else net.config.get("patch_size_t") or 1

    def to_latents(self, vae: DiffusersModel, images: Tensor) -> Tensor:
        """The autoencoder's latents of images in [-1, 1]; the mean if it returns a distribution."""
        out = vae.encode(images)
        return out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latent

    def normalise(self, vae: DiffusersModel, z: Tensor) -> Tensor:
        """Autoencoder latents to x0."""
        if self.latent_statistics == "channels" and has_channel_statistics(vae):
            mean, std = channel_statistics(vae, z)
            return (z - mean) * vae.config.get("scaling_factor", 1.0) / std
        return (z - self._shift(vae)) * vae.config.scaling_factor

    def denormalise(self, vae: DiffusersModel, x0: Tensor) -> Tensor:
        """x0 to autoencoder latents; inverse of `normalise`."""
        if self.latent_statistics == "channels" and has_channel_statistics(vae):
            mean, std = channel_statistics(vae, x0)
            return x0 * std / vae.config.get("scaling_factor", 1.0) + mean
        return x0 / vae.config.scaling_factor + self._shift(vae)

    def _shift(self, vae: DiffusersModel) -> float:
        return (vae.config.get("shift_factor") or 0.0) if self.latent_statistics == "shift" else 0.0

    def decode(self, vae: DiffusersModel, z: Tensor) -> Tensor:
        """Images in [-1, 1] of autoencoder latents."""
        return vae.decode(z, return_dict=False)[0]

    # -- the scheduler --------------------------------------------------------------------------------------
    def shift(self, scheduler: Any, net: DiffusersModel, grid: tuple[int, ...]) -> float:
        """Time shift s of the teacher's flow scheduler at a latent size: u becomes s u / (1 + (s - 1) u)."""
        config = scheduler.config
        if config.get("use_dynamic_shifting"):
            return dynamic_shift(config, self.tokens(net, grid))
        return config.get("flow_shift") or config.get("shift") or 1.0

    def noised(self, schedule: Schedule, net: DiffusersModel) -> Schedule:
        """How the network's data are noised, where its own config changes the scheduler's schedule."""
        return schedule

    def tokens(self, net: DiffusersModel, grid: tuple[int, ...]) -> int:
        """Number of tokens of the image, on which a dynamic shift depends."""
        return int(torch.tensor(grid).prod()) // self.divisor**2

    def size_call(self, codec) -> dict:
        """Keyword arguments of a pipeline call that set the size of the result."""
        size = dict(zip(("height", "width"), codec.pixels))
        return size | ({"num_frames": codec.num_frames} if self.temporal else {})

    def guidance_call(self, embedded: float | None) -> dict:
        """Keyword arguments that switch the pipeline's guidance off, or pass the network its scale."""
        return {k: v if embedded is None else float(embedded) for k, v in self.guidance_off.items()}

    def guided_call(self, w: float) -> dict:
        """Keyword arguments that make the pipeline guide with scale w (fastgen's convention)."""
        return dict.fromkeys(self.guidance_off, float(w))

    def guidance_norm(self, out: Tensor) -> Tensor:
        """With guidance_keeps_norm: the norm of a flow prediction, broadcastable to it."""
        raise NotImplementedError

    def plain_call(self, info: dict) -> dict:
        """Keyword arguments of a pipeline call besides size, steps and guidance; info is fastgen.json."""
        length = info.get("max_sequence_length")
        return self.call_arguments | ({"max_sequence_length": length} if length else {})

    def pipeline_latents(self, noise: Tensor, schedule) -> Tensor:
        """Standard normal noise in the layout of the pipeline's `latents` argument (packed, transposed)."""
        return noise

    def load_lora(self, pipe, folder, file: str) -> None:
        """Load an exported adapter into the pipeline, as a user would."""
        names = [n for n in self.lora_parts or (self.component,) if getattr(pipe, n, None) is not None]
        for call in self.lora_calls(file, names):
            pipe.load_lora_weights(folder, **call)

    def lora_calls(self, file: str, parts: list[str]) -> list[dict]:
        """Keyword arguments of load_lora_weights for each adapted network; `file` is the first one's."""
        more = [{"weight_name": part_name(file, p), f"load_into_{p}": True} for p in parts[1:]]
        return [{"weight_name": file}, *more]

    # -- features -------------------------------------------------------------------------------------------
    def taps(self, net: DiffusersModel) -> list[nn.Module]:
        """Modules whose outputs can be used as features, shallow to deep."""
        return list(net.transformer_blocks)

    def default_taps(self, net: DiffusersModel) -> tuple[int, ...]:
        """Taps that a discriminator reads by default."""
        return (len(self.taps(net)) * 3 // 4,)

    def spread_taps(self, net: DiffusersModel, num: int) -> tuple[int, ...]:
        """Up to `num` taps, evenly spaced over the depth, the last included (LADD)."""
        total = len(self.taps(net))
        return tuple(sorted({round((i + 1) * total / num) - 1 for i in range(num)} - {-1}))

    def image_tokens(self, net: DiffusersModel, out: Tensor, x: Tensor, cond: Cond) -> Tensor:
        """The image's tokens of a tapped output, if the block has text and image in one sequence."""
        return out

    def feature_map(self, net: DiffusersModel, out: Tensor, x: Tensor) -> Tensor:
        """A tapped output as a map [B, C, h, w]; video frames are stacked along h."""
        return fold_tokens(out, x, patch_of(net))

    def feature_channels(self, net: DiffusersModel) -> list[int]:
        """Number of channels of each tap."""
        width = net.config.num_attention_heads * net.config.attention_head_dim
        return [width] * len(self.taps(net))

    # -- denoisers of several parts -------------------------------------------------------------------------
    def parts(self, net: DiffusersModel) -> dict[str, DiffusersModel]:
        """The networks of the denoiser by component folder."""
        return {n: getattr(net, n) for n in net.names} if isinstance(net, Parts) else {self.component: net}

    def assemble(self, parts: dict[str, DiffusersModel], index: dict) -> DiffusersModel:
        """The denoiser made of its networks (by component folder), given the pipeline's model_index.json."""
        return parts[self.component] if len(parts) == 1 else Parts(**parts)

    def adapted(self, net: DiffusersModel) -> dict[str, DiffusersModel]:
        """Networks that LoRA adapts, by component folder, the denoiser itself first."""
        parts = self.parts(net)
        return {n: parts[n] for n in self.lora_parts or (self.component,) if n in parts}

    def reads_kohya(self, layers: Iterable[str]) -> bool:
        """Whether diffusers reads all these layers from a LoRA file of the kohya format."""
        known = all(matches(name, self.kohya_layers) for name in layers)
        return self.kohya_prefix is not None and known

    def is_unreached(self, name: str, net: DiffusersModel) -> bool:
        """Whether a parameter is documented (in `unreached`) to get no gradient."""
        last = str(len(self.taps(net)) - 1)
        return matches(name, (pattern.replace("{last}", last) for pattern in self.unreached))
