"""What one family of diffusers denoisers does differently, as a declaration.

A family states attributes; most need no method. `call` is the network seen from outside: x is always the
plain latent [B, C, h, w] ([B, C, f, h, w] for video), time the network's own, and what comes back is the
native prediction in the shape of x. Packing, ids, masks, sign and channels to keep live behind it.
"""

from fnmatch import fnmatch
from typing import Literal

import torch
from torch import Tensor, nn

from fastgen.core.batch import Cond
from fastgen.core.errors import UserError
from fastgen.families.parts import Parts, dynamic_shift, fold_tokens, one_channel_wider, part_name, patch_of


class Family:
    """One declaration; instances stand in a module's FAMILIES tuple, the most particular first."""

    # -- which one ------------------------------------------------------------------------------------------
    name: str
    net_class: str
    """diffusers class of the denoiser"""
    component: str = "transformer"
    """its folder inside a pipeline"""
    extra: tuple[str, ...] = ()
    """further folders whose networks act with it (see `Parts`); those missing in a pipeline are left out"""
    pipelines: tuple[str, ...] = ()
    """pipeline classes that hold it; an export without a source folder names the first"""

    # -- the call -------------------------------------------------------------------------------------------
    sample_key: str = "hidden_states"
    time_key: str = "timestep"
    keys: tuple[str, ...] = ("encoder_hidden_states",)
    """cond entries handed to the network under their own names, floats in the network's dtype"""
    flow_time: Literal["t1000", "unit", "reversed"] = "t1000"
    """the network's time argument at level t of a flow: 1000 t, t or 1 - t"""
    edm_time: float = 0.25
    """the network's time argument at noise level sigma of an EDM schedule, over ln sigma"""
    sign: int = 1
    """-1 where the network's output is the negative of the scheduler's prediction"""
    schedules: tuple[str, ...] = ("Flow",)
    """noise schedules that such networks are trained under; a scheduler of another kind is a mistake"""
    boundary: bool = False
    """EDM preconditioning with the boundary condition of consistency models, D(x, sigma_min) = x"""

    # -- conditions -----------------------------------------------------------------------------------------
    kind: Literal["text", "labels"] = "text"
    """asked by prompts (and images), or by class labels (or nothing)"""
    max_length: int | None = None
    """tokens of a prompt where the pipeline leaves the choice; None is the tokenizer's own limit"""
    tokenizer: str = "tokenizer"
    """the pipeline's tokenizer that limits a prompt"""
    default_guidance: float | None = None
    """guidance that the network takes as an input (w-embedded, guidance-distilled); None if it has none"""
    takes_text: bool = True
    """whether its pipeline is asked by a prompt (among others)"""
    label_key: str = ""
    """keyword by which its pipeline is asked for a class; empty where no pipeline can be"""
    needs_image: bool = False
    """cond holds an image (first frame, control image) besides the text"""

    # -- sizes ----------------------------------------------------------------------------------------------
    factor: int = 8
    """pixels per latent side, unless the pipeline's autoencoder says another"""
    folded: int = 1
    """side of the square of the autoencoder's latent pixels that is one pixel of x0, its rest in channels"""
    temporal: int = 0
    """frames per latent frame (frames = temporal k + 1); 0 for images"""
    sized: bool = True
    """whether a sample has a height and a width to choose"""
    divisor: int = 1
    """what the sides of a latent must be divisible by"""
    square: bool = False
    """height and width must be equal"""
    default_grid: tuple[int, ...] = ()
    """latent (h, w) or (f, h, w) where neither the user nor the config says one"""

    decoder: str = "vae"
    """the pipeline's part that turns latents into what is seen"""
    views: bool = False
    """a decoded sample is a turn around an object, [B, C, F, H, W] like a video's"""

    # -- students -------------------------------------------------------------------------------------------
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """module-name endings that a LoRA student adapts by default"""
    lora_parts: tuple[str, ...] = ()
    """of `Parts`, those that adapters may touch; empty means the first alone"""
    final_layers: tuple[str, ...] = ()
    """patterns of full module names (time embedding, output layer) that a LoRA ending should not hit by
    accident; the default endings leave them out
    """
    lora_loader: bool = True
    """whether the pipeline has load_lora_weights; if not, `export.lora.load_lora_into` reads the file"""
    kohya_prefix: str | None = None
    kohya_layers: tuple[str, ...] = ("*",)
    """patterns of the layers that diffusers reads from kohya's names; with others no such file is written"""
    unreached: dict[str, str] = {}
    """patterns of parameters that no gradient reaches ({last} is the last tapped block), and why"""
    tap_output: int = 0
    """which output of a tapped block is the image stream, where it returns several"""

    time_layers: tuple[str, str] = ("time_proj", "time_embedding")
    """the sinusoids of the time and the two-layer embedder behind them"""
    input_layer: str = "conv_in"
    """convolution that reads the latent; a second time enters as one more of its channels"""
    guidance_layers: tuple[str, ...] = ()
    """layers that `add_guidance` makes; a LoRA student adapts them too"""
    guidance_form: str = ""
    """the setting without which no pipeline tells such a network its guidance scale"""

    # -- the exported pipeline ------------------------------------------------------------------------------
    call_arguments: dict = {}
    """keywords a plain pipeline call needs to do what we do"""
    guidable: bool = True
    """the pipeline can guide away from a null condition"""
    guidance_keeps_norm: bool = False
    """the pipeline rescales what it has guided to the size of the conditional prediction"""
    guidance_off: dict = {"guidance_scale": 1.0}
    """keywords that switch the pipeline's own guidance off"""
    index_extra: dict = {}
    """entries that a model_index.json of ours needs besides the components"""
    default_sigmas: bool = False
    """the pipeline hands 1 - k/N to the scheduler itself, so that `shift` alone places the steps"""

    @property
    def pipeline(self) -> str:
        return self.pipelines[0] if self.pipelines else ""

    def matches(self, index: dict, config: dict) -> bool:
        """Whether a folder's model_index.json and denoiser config.json are this family's; the class is."""
        return True

    # -- the call -------------------------------------------------------------------------------------------
    def call(self, net: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """Native prediction, shaped like x, at the network's own time [B]."""
        given = {self.sample_key: x, self.time_key: time, **self.given(x, cond), "return_dict": False}
        return self.sign * net(**given)[0][:, : x.shape[1]]

    def given(self, x: Tensor, cond: Cond) -> Cond:
        """The cond entries of `keys`, floats in x's dtype; those absent are not passed."""
        found = {k: cond[k] for k in self.keys if k in cond}
        return {k: v.to(x.dtype) if v.is_floating_point() else v for k, v in found.items()}

    # -- conditions -----------------------------------------------------------------------------------------
    def cond_shapes(self, net: nn.Module, codec) -> dict[str, tuple[int, ...]]:
        """Shape of one row of each cond entry, told without a text encoder: for --dry_run and examples."""
        raise NotImplementedError(f"{self.name} declares no cond_shapes")

    def encode(self, codec, prompts: list[str]) -> Cond:
        """Prompts through the pipeline's own encode_prompt (codec.pipe), in float32."""
        raise NotImplementedError(f"{self.name} declares no encode")

    def null(self, codec) -> Cond:
        """One row: what the pipeline guides away from when no negative prompt is given."""
        return self.encode(codec, [""])

    def encode_image(self, codec, images: Tensor) -> Cond:
        """The image part of cond, from pixels [B, 3, H, W] in [-1, 1]."""
        raise NotImplementedError(f"{self.name} takes no image")

    def has_null(self, net: nn.Module, classes: int) -> bool:
        """Whether a class-conditional network has a row for 'no class', the one after the last class."""
        return 0 < classes < (net.config.get("num_class_embeds") or 0)

    def nulled(self, cond: Cond) -> Cond:
        """What the pipeline makes of a null condition that came with an image; most keep the image."""
        return cond

    def guidance_embedded(self, net: nn.Module) -> bool:
        return self.default_guidance is not None

    def add_guidance(self, net: nn.Module) -> nn.Module:
        """The same function by a network that also takes cond["guidance"] [B]; new layers end in zeros."""
        raise UserError(
            "student.guidance_embedding",
            f"{self.net_class} has no input for the guidance scale",
            "leave it out: the student learns teacher.guidance alone",
        )

    def add_second_time(self, net: nn.Module) -> nn.Module:
        """The same function by a network that reads a second time as one more input channel."""
        wider = one_channel_wider(net, self.input_layer)
        if wider is None:
            told = f"{self.net_class} has no plain convolution over its latent for a second time to enter by"
            raise UserError("objective.name", told, "a method whose network takes one time")
        return wider

    # -- latents --------------------------------------------------------------------------------------------
    def channels(self, net: nn.Module) -> int:
        """Channels of x0."""
        return net.config.in_channels

    def grid(self, net: nn.Module) -> tuple[int, ...]:
        """Latent (h, w) or (f, h, w) that the network was made for."""
        size = net.config.get("sample_size")
        if size is None:
            return self.default_grid
        return tuple(size) if isinstance(size, (list, tuple)) else (size, size)

    def encoded(self, vae: nn.Module, images: Tensor) -> Tensor:
        """The autoencoder's latents of pixels in [-1, 1], the mean where it gives a distribution."""
        found = vae.encode(images)
        return found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latent

    def normalise(self, vae: nn.Module, z: Tensor) -> Tensor:
        """Autoencoder latents to x0."""
        return (z - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor

    def denormalise(self, vae: nn.Module, x0: Tensor) -> Tensor:
        """x0 to what the autoencoder decodes."""
        return x0 / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)

    def decode(self, vae: nn.Module, z: Tensor) -> Tensor:
        """Pixels in [-1, 1] of denormalised latents."""
        return vae.decode(z, return_dict=False)[0]

    # -- the scheduler --------------------------------------------------------------------------------------
    def shift(self, scheduler, net: nn.Module, grid: tuple[int, ...]) -> float:
        """Time shift s of the teacher's flow scheduler at this latent size (`s u / (1 + (s - 1) u)`)."""
        config = scheduler.config
        if config.get("use_dynamic_shifting"):
            return dynamic_shift(config, self.tokens(net, grid))
        return config.get("flow_shift") or config.get("shift") or 1.0

    def tokens(self, net: nn.Module, grid: tuple[int, ...]) -> int:
        """Length of the image's token sequence, on which dynamic shifts depend."""
        return int(torch.tensor(grid).prod()) // self.divisor**2

    def size_call(self, codec) -> dict:
        """Keywords of a plain pipeline call that say how large the result is."""
        size = dict(zip(("height", "width"), codec.pixels))
        return size | ({"num_frames": codec.num_frames} if self.temporal else {})

    def guidance_call(self, embedded: float | None) -> dict:
        """Keywords that switch the pipeline's guidance off, or hand the network the scale it takes."""
        return {k: v if embedded is None else float(embedded) for k, v in self.guidance_off.items()}

    def guided_call(self, w: float) -> dict:
        """Keywords that make the pipeline guide with our w."""
        return dict.fromkeys(self.guidance_off, float(w))

    def guidance_norm(self, out: Tensor) -> Tensor:
        """Where guidance_keeps_norm: the size of a flow prediction, shaped to divide it."""
        raise NotImplementedError

    def plain_call(self, info: dict) -> dict:
        """Keywords of a plain pipeline call beyond size, steps and guidance; info is fastgen.json."""
        length = info.get("max_sequence_length")
        return self.call_arguments | ({"max_sequence_length": length} if length else {})

    def pipeline_latents(self, noise: Tensor, schedule) -> Tensor:
        """Unit noise as the pipeline's `latents` argument takes it (packed, scaled, transposed)."""
        return noise

    def load_lora(self, pipe, folder, file: str) -> None:
        """What a user writes to put an exported adapter into the pipeline."""
        held = [n for n in self.lora_parts or (self.component,) if getattr(pipe, n, None) is not None]
        for call in self.lora_calls(file, held):
            pipe.load_lora_weights(folder, **call)

    def lora_calls(self, file: str, parts: list[str]) -> list[dict]:
        """Keywords of load_lora_weights for each adapted network's file, the first one's given."""
        more = [{"weight_name": part_name(file, p), f"load_into_{p}": True} for p in parts[1:]]
        return [{"weight_name": file}, *more]

    # -- features -------------------------------------------------------------------------------------------
    def taps(self, net: nn.Module) -> list[nn.Module]:
        """Modules whose outputs serve as features, shallow to deep."""
        return list(net.transformer_blocks)

    def default_taps(self, net: nn.Module) -> tuple[int, ...]:
        """Taps a discriminator reads unless told otherwise."""
        return (len(self.taps(net)) * 3 // 4,)

    def spread_taps(self, net: nn.Module, num: int) -> tuple[int, ...]:
        """Up to `num` taps, evenly from a first fraction of the depth to the last (LADD)."""
        total = len(self.taps(net))
        return tuple(sorted({round((i + 1) * total / num) - 1 for i in range(num)} - {-1}))

    def image_tokens(self, net: nn.Module, out: Tensor, x: Tensor, cond: Cond) -> Tensor:
        """Of a tapped output, the image's part, where a block holds text and image in one sequence."""
        return out

    def feature_map(self, net: nn.Module, out: Tensor, x: Tensor) -> Tensor:
        """A tapped output as [B, C, h, w]; video frames are stacked along h."""
        return fold_tokens(out, x, patch_of(net))

    def feature_channels(self, net: nn.Module) -> list[int]:
        """Channels of each tap."""
        width = net.config.num_attention_heads * net.config.attention_head_dim
        return [width] * len(self.taps(net))

    # -- networks of several parts --------------------------------------------------------------------------
    def parts(self, net: nn.Module) -> dict[str, nn.Module]:
        """Networks by component folder."""
        return {n: getattr(net, n) for n in net.names} if isinstance(net, Parts) else {self.component: net}

    def assemble(self, parts: dict[str, nn.Module], index: dict) -> nn.Module:
        """The denoiser out of its parts, by component folder, and the pipeline's model_index.json."""
        return parts[self.component] if len(parts) == 1 else Parts(**parts)

    def adapted(self, net: nn.Module) -> dict[str, nn.Module]:
        """Networks that adapters may touch, by component folder; the first comes first."""
        parts = self.parts(net)
        return {n: parts[n] for n in self.lora_parts or (self.component,) if n in parts}

    def reads_kohya(self, layers) -> bool:
        """Whether a file of these layers under kohya's names can be read back whole."""
        known = all(any(fnmatch(name, pattern) for pattern in self.kohya_layers) for name in layers)
        return self.kohya_prefix is not None and known

    def is_unreached(self, name: str, net: nn.Module) -> bool:
        """Whether a parameter is a documented exception to 'gradient reaches everything'."""
        last = str(len(self.taps(net)) - 1)
        return any(fnmatch(name, pattern.replace("{last}", last)) for pattern in self.unreached)
