"""Small components that several tiny pipelines share: text encoders, tokenizers, autoencoders."""

import string

from tests.tiny import clip_tokenizer, gemma_tokenizer  # noqa: F401

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def clip_text(hidden: int = 32, projection: bool = False):
    """CLIPTextModel over the byte tokenizer; with its projection for pooled outputs."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=hidden,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        projection_dim=hidden,
        vocab_size=515,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=2,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5_tokenizer():
    """A Unigram model over printable characters."""
    from transformers import T5TokenizerFast

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    letters = [(c, -3.0) for c in string.printable if c not in string.whitespace]
    return T5TokenizerFast(vocab=special + letters, extra_ids=0)


def t5_text(width: int = 32):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4, vocab_size=98)
    return T5EncoderModel(config).eval()


def autoencoder(channels: int = 4, **more):
    """AutoencoderKL, two pixels per latent side."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **more,
    ).eval()
