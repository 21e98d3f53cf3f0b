"""A denoiser that fastgen has no family for, declared as a user would in YAML: AuraFlow."""

import torch

from tests.families.cases import Case
from tests.families.cases.parts import autoencoder, t5_text, t5_tokenizer
from tests.support.tiny import perturb_zero_layers

DECLARATION = {
    "pipelines": ["AuraFlowPipeline"],
    "flow_time": "unit",
    "max_length": 16,
    "divisor": 2,
    "cond_shapes": {"encoder_hidden_states": [16, 32]},
    "prompt_outputs": {"encoder_hidden_states": 0},
    "null_outputs": {"encoder_hidden_states": 2},
    "taps": "joint_transformer_blocks",
    "tap_output": 1,
    "lora_targets": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"],
    "final_layers": ["proj_out", "time_*", "norm_out*"],
    "default_sigmas": False,
    "call_arguments": {"max_sequence_length": 16},
}


def auraflow_folder(folder):
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    torch.manual_seed(23)
    net = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    perturb_zero_layers(net)
    AuraFlowPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_text(),
        vae=autoencoder(),
        transformer=net.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    ).save_pretrained(folder)


CASES = [
    Case(
        "declared-AuraFlowTransformer2DModel",
        auraflow_folder,
        name="declared",
        options={"family": DECLARATION},
    )
]
