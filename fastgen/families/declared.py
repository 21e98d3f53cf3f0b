"""A family declared in a config under teacher.family, for a diffusers denoiser that fastgen does not know.

    teacher:
      path: my/folder
      family:
        component: transformer
        pipelines: [AuraFlowPipeline]
        flow_time: unit                     # or t1000, reversed
        keys: [encoder_hidden_states]       # cond entries by their names as arguments of the network
        cond_shapes: {encoder_hidden_states: [256, 2048]}
        prompt_outputs: {encoder_hidden_states: 0}    # positions in what encode_prompt returns
        null_outputs: {encoder_hidden_states: 2}      # default: the empty prompt
        taps: [single_transformer_blocks]
        lora_targets: [to_q, to_k, to_v]

Every attribute of `Family` may be set; the others keep their defaults.
"""

import inspect
from typing import Any

from torch import Tensor, nn

from fastgen.core.batch import Cond
from fastgen.core.errors import UserError, suggest
from fastgen.families.base import Family
from fastgen.families.parts import DiffusersModel

OWN = ("cond_shapes", "prompt_outputs", "null_outputs", "taps", "prompt_arguments")


class Declared(Family):
    """The base declaration with a user's values."""

    schedules = ("VP", "Flow", "EDM", "TrigFlow")
    shapes: dict[str, list[int]] = {}
    outputs: dict[str, int] = {}
    nulls: dict[str, int] = {}
    tap_lists: tuple[str, ...] = ("transformer_blocks",)
    arguments: dict[str, Any] = {}

    def cond_shapes(self, net: DiffusersModel, codec) -> dict[str, tuple[int, ...]]:
        return {k: tuple(v) for k, v in self.shapes.items()}

    def encode(self, codec, prompts: list[str]) -> Cond:
        return self._encoded(codec, prompts, self.outputs, False)

    def null(self, codec) -> Cond:
        if not self.nulls:
            return self.encode(codec, [""])
        return self._encoded(codec, [""], self.nulls, True)

    def _encoded(self, codec, prompts: list[str], outputs: dict[str, int], guided: bool) -> Cond:
        """Outputs of encode_prompt by name; only arguments in its signature are passed."""
        given = {"prompt": prompts, "device": codec.device, "max_sequence_length": codec.max_length}
        given |= {"num_images_per_prompt": 1, "do_classifier_free_guidance": guided, **self.arguments}
        known = inspect.signature(codec.pipe.encode_prompt).parameters
        out = codec.pipe.encode_prompt(**{k: v for k, v in given.items() if k in known})
        out = out if isinstance(out, tuple) else (out,)
        key, function = "teacher.family.prompt_outputs", f"{type(codec.pipe).__name__}.encode_prompt"
        if not outputs or max(outputs.values()) >= len(out):
            found = f"{outputs}, but {function} returns {len(out)} values"
            raise UserError(key, found, f"give the position of each cond entry, from 0 to {len(out) - 1}")
        picked = {k: out[i] for k, i in outputs.items()}
        wrong = [k for k, v in picked.items() if not isinstance(v, Tensor)]
        if wrong:
            found = f"value {outputs[wrong[0]]} of {function}, for {wrong[0]}, is not a tensor"
            raise UserError(key, found, f"give the position of {wrong[0]} among the returned values")
        return {k: v.float() if v.is_floating_point() else v for k, v in picked.items()}

    def taps(self, net: DiffusersModel) -> list[nn.Module]:
        for name in self.tap_lists:
            if not hasattr(net, name):
                found = f"{type(net).__name__} has no {name!r}"
                lists = [n for n, m in net.named_children() if isinstance(m, nn.ModuleList)]
                raise UserError(
                    "teacher.family.taps", found, f"choose from its lists of blocks: {', '.join(lists)}"
                )
        return [block for name in self.tap_lists for block in getattr(net, name)]


def declared(values: dict, net_class: str) -> Family:
    """The family of a network class by a user's values of teacher.family."""
    known = {k for k in Family.__annotations__ if k not in ("name", "net_class")}
    for key in values:
        if key not in known and key not in OWN:
            allowed = f"allowed: {', '.join(sorted(known | set(OWN)))}"
            raise UserError(f"teacher.family.{key}", f"unknown key{suggest(key, known | set(OWN))}", allowed)
    for key in ("pipelines", *(("cond_shapes", "prompt_outputs") if values.get("kind") != "labels" else ())):
        if not values.get(key):
            raise UserError(
                f"teacher.family.{key}", "not given", "add it as in docs/families.md, 'An unknown denoiser'"
            )
    family = Declared()
    family.name, family.net_class = f"declared-{net_class}", net_class
    renamed = {"cond_shapes": "shapes", "prompt_outputs": "outputs", "null_outputs": "nulls"}
    renamed |= {"taps": "tap_lists", "prompt_arguments": "arguments"}
    for key, value in values.items():
        default = getattr(Family, key, None)
        if isinstance(default, tuple) or key == "taps":
            value = tuple([value] if isinstance(value, str) else value)
        elif isinstance(default, (bool, int, str, dict)) and not isinstance(value, type(default)):
            allowed = f"give a value of the type of its default {default!r}"
            raise UserError(f"teacher.family.{key}", f"found {value!r}", allowed)
        setattr(family, renamed.get(key, key), value)
    return family
