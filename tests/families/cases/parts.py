"""Small components that several tiny pipelines share: text encoders, tokenizers, autoencoders."""

import string

from tests.support.tiny import (
    clip_tokenizer,  # noqa: F401
    gemma_tokenizer,  # noqa: F401
)

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FLOW_KL = {
    "shift_factor": 0.0609,
    "scaling_factor": 1.5035,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
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


def qwen_tokenizer():
    """Qwen's tokenizer over single bytes, with its chat marks and a plain chat template."""
    from transformers import Qwen2TokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    end = "<|endoftext|>"
    characters = [*bytes_to_unicode().values(), end]
    tokenizer = Qwen2TokenizerFast(
        vocab={c: i for i, c in enumerate(characters)}, merges=[], pad_token=end, eos_token=end, unk_token=end
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


def qwen3_text(cls: str = "Qwen3Model", layers: int = 2):
    """A Qwen3 language model of width 16."""
    import transformers

    config = transformers.Qwen3Config(
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_hidden_layers=layers,
        vocab_size=259,
        tie_word_embeddings=True,
    )
    return getattr(transformers, cls)(config).eval()


def qwen_vl_text():
    """The text half of Qwen2.5-VL at width 16, with a vision half as small as its class allows."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 259,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        "rope_theta": 1000000.0,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
    }
    marks = {"image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **marks)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def gemma_text():
    """A Gemma2 model of width 8."""
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(
        Gemma2Config(
            hidden_size=8,
            head_dim=4,
            intermediate_size=8,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_hidden_layers=2,
            sliding_window=2,
            vocab_size=len(gemma_tokenizer()),
        )
    ).eval()


def flow_kl():
    """As the flow models ship it: a shift as well as a scale, no quantisation convolutions."""
    return autoencoder(**FLOW_KL)
