"""The data section of a run's configuration. The docstrings of the fields are the text of --help."""

from typing import Annotated, Literal

import tyro.conf
from pydantic import Field

from fastgen.config.assets import ViewsConfig
from fastgen.config.section import Section, UserPath


class DegradationConfig(Section):
    """Low-resolution pictures that are made of the data's own and shown to the network: super-resolution."""

    factor: Literal[2, 4, 8, 16] = 4
    """how many times smaller the picture is that is enlarged"""
    teacher_factor: Literal[1, 2, 4, 8] | None = None
    """for scale_distillation: the milder factor whose picture the teacher is shown; null is half of factor"""
    kind: Literal["bicubic", "area", "camera"] = "bicubic"
    """filter of each halving; camera blurs and adds noise of random strength before the bicubic one"""


class AppearanceConfig(Section):
    """Pictures whose look the frames of a few-step video student take over: mcm."""

    images: UserPath = ""
    """folder of them; they need no captions, and are scaled and cropped to the size of a frame"""
    name: str = ""
    """bundled set instead of a folder: tinted, or moving (a frame of each clip)"""
    contrast: float = Field(default=1.0, gt=0, le=10)
    """factor by which their values are moved away from mid-grey, and cut off at black and white"""
    limit: int = Field(default=2000, ge=1)
    """use only this many, the first; they are kept in memory"""


class SourceConfig(Section):
    """One source of pictures with their captions or labels, and how much of it is drawn."""

    images: UserPath = ""
    """folder of images (for video: animated gif, webp, png, or mp4); captions in metadata.jsonl or
    metadata.csv (file_name, text) or in a .txt file of the same name per image; classes in its column label,
    or a folder per class
    """
    table: UserPath = ""
    """csv, jsonl or parquet file with a row per image: a path beside the file, and a caption or label"""
    dataset: UserPath = ""
    """folder of a data set saved by Hugging Face's `datasets`, folder of parquet or arrow files, or hub id
    (OWNER/NAME); needs the extra [data]
    """
    shards: UserPath = ""
    """webdataset archives on this disk: a .tar file, a folder of them, a pattern such as my/train-*.tar, or a
    span such as my/train-{000..063}.tar
    """
    split: str = "train"
    """split of data.dataset"""
    image_column: str = ""
    """column of the image in data.table or data.dataset; empty is image, file_name, file, path or jpg"""
    text_column: str = ""
    """column of the caption there and in the .json of data.shards; empty is text, caption or prompt"""
    label_column: str = ""
    """column of the class there; empty is label, class or cls"""
    weight: float = Field(default=1.0, gt=0)
    """share of the samples that come from this source, relative to those of data.sources"""


class DataConfig(SourceConfig):
    """Training images with their labels or captions, or prompts only."""

    name: str = ""
    """bundled data set: digits, fashion, tinted, solids, moving (clips) or scenes (simulated scans); instead
    of images or prompts of your own
    """
    latents: UserPath = ""
    """folder that `fastgen precompute` wrote: encoded images and prompts of this teacher"""
    scans: UserPath = ""
    """for teachers that complete scans: folder with scan/ and truth/, which hold point clouds (.ply, .bin or
    .npy) alike in name
    """
    prompts: UserPath = ""
    """text file with one prompt per line, for methods that need no images"""
    views: ViewsConfig | None = None
    """one prompt and the cameras that it is seen from, for a student that is a 3D asset"""
    sources: Annotated[tuple[SourceConfig, ...], tyro.conf.Suppress] = ()
    """further sources of pictures, drawn from by their weights; in files only"""
    control: UserPath = ""
    """folder of control images (edges, depth), named like data.images or in their order, for teachers with a
    ControlNet
    """
    degradation: DegradationConfig | None = None
    """make the picture that the network is shown from the data's own, for super-resolution with teachers that
    take an image; captions are then left out
    """
    fps: Annotated[float, Field(gt=0, le=1000)] | None = None
    """of clips of your own: take the frames that are seen this many times a second from each clip's first on;
    null takes every frame. A clip of a lower rate, or shorter at this one, counts as one that cannot be read
    """
    dispreferred: UserPath = ""
    """for pso: folder with one image for each of data.images, of the same name, to which that is preferred"""
    appearance: AppearanceConfig | None = None
    """for mcm: pictures whose look frames take over; null takes that of the clips' own frames"""
    limit: int = Field(default=0, ge=0)
    """use only this many examples, the first, of each source; 0 is all"""
    on_bad_image: Literal["skip", "error"] = "skip"
    """at an image that cannot be read or lacks its caption or label: skip it with a warning, or stop with an
    error
    """
    on_bad_shard: Literal["skip", "error"] = "error"
    """at an archive or a file of latents that is missing or cut short: stop with an error, or skip it with a
    warning
    """
    stream: Literal["auto", "always", "never"] = "auto"
    """read pictures when a batch needs them, not before the first step; auto does for sets of more than
    20,000 files or 256 MiB of pixels
    """
    buckets: tuple[str, ...] = ()
    """sizes HEIGHTxWIDTH, such as 512x768 768x512: each picture is trained on at the one nearest in shape,
    each batch at one size; for clips FRAMESxHEIGHTxWIDTH, at one of the longest it has frames for; empty is
    the teacher's own size
    """
    workers: int = Field(default=4, ge=0, le=256)
    """threads that read ahead where pictures are streamed; 0 reads within the step. Batches do not depend on
    it
    """
    caption_dropout: float = Field(default=0.0, ge=0, lt=1)
    """share of the samples that are trained on with the empty caption or the null class instead of their own
    """
    allow_download: bool = False
    """allow the download of a data set given by hub id; false uses the local cache only"""
    cache_dir: UserPath = ""
    """folder in which encoded latents and prompts are kept between runs; empty keeps them in memory"""
