"""Scripts that render what an exported generator of 3D assets makes of a prompt, from the teacher's text
encoder and the weights alone: `LOADERS[kind]`, run as `script teacher export picture prompt`.
"""

TEXT = """
import sys, torch, numpy as np, torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer
teacher, export, out, prompt = sys.argv[1:]
w = load_file(export + "/generator.safetensors")
tokens = CLIPTokenizer.from_pretrained(teacher + "/tokenizer")(
    prompt, padding="max_length", truncation=True, return_tensors="pt"
)
torch.set_grad_enabled(False)
text = CLIPTextModel.from_pretrained(teacher + "/text_encoder")(tokens.input_ids)[0]
def linear(x, name):
    return F.linear(x, w[name + ".weight"], w.get(name + ".bias"))
def norm(x, name):
    return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"])
def told():
    return F.silu(norm(linear(text.mean(1), "told.0"), "told.1"))
"""
FIELD = {
    "grid": """
z = told()
h = linear(z, "start").view(1, -1, 4, 4, 4)
for i in range(sum(k.endswith("conv.weight") for k in w)):
    at = f"blocks.{i}."
    h = F.group_norm(F.conv3d(h, w[at + "conv.weight"], w[at + "conv.bias"], padding=1), 8)
    a, b = linear(z, at + "style")[..., None, None, None].chunk(2, 1)
    h = F.interpolate(F.silu((1 + a) * h + b), scale_factor=2, mode="trilinear")
made = 4 * F.conv3d(h, w["out.weight"], w["out.bias"], padding=1)
def values(p):
    found = F.grid_sample(made, p.view(1, -1, 1, 1, 3), align_corners=True, padding_mode="border")
    return found[0, :, :, 0, 0].T
""",
    "hash": """
tables, sides = w["tables.tables"], w["tables.resolutions"]
weights, features = linear(told(), "weights")[0], 2 * len(sides)
first, last = weights[: 32 * features].view(32, features), weights[32 * features :].view(4, 32)
def values(p):
    at, found = (p / 2 + 0.5).clamp(0, 1), []
    for table, side in zip(tables, sides):
        low, level = (at * side).floor(), 0
        for corner in ((x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)):
            c = torch.tensor(corner)
            i = low.long() + c
            i = (i[:, 0] ^ i[:, 1] * 2654435761 ^ i[:, 2] * 805459861) % table.shape[0]
            near = torch.where(c.bool(), at * side - low, 1 - at * side + low).prod(1)
            level = level + near[:, None] * table[i]
        found.append(level)
    return F.relu(torch.cat(found, 1) @ first.T) @ last.T
""",
    "triplane": """
def attend(asked, said, name):
    wide = asked.shape[-1]
    if name + "in_proj_weight" in w:
        q, k, v = w[name + "in_proj_weight"].chunk(3)
    else:
        q, k, v = (w[name + n + "_proj_weight"] for n in "qkv")
    b = w[name + "in_proj_bias"].chunk(3)
    heads = max(n for n in range(1, max(1, wide // 32) + 1) if wide % n == 0)
    q, k, v = (F.linear(x, m, c).unflatten(-1, (heads, -1)).transpose(1, 2)
               for x, m, c in zip((asked, said, said), (q, k, v), b))
    return linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), name + "out_proj")
h = w["tokens"][None]
for i in range(4):
    at = f"blocks.{i}."
    h = h + attend(norm(h, at + "norms.0"), text, at + "cross.")
    asked = norm(h, at + "norms.1")
    h = h + attend(asked, asked, at + "own.")
    h = h + linear(F.gelu(linear(norm(h, at + "norms.2"), at + "mlp.0")), at + "mlp.2")
side = round((h.shape[1] / 3) ** 0.5)
planes = norm(h, "norm")[0].view(3, side, side, -1).permute(0, 3, 1, 2)
planes = F.conv_transpose2d(planes, w["up.weight"], w["up.bias"], stride=2)
def values(p):
    where = torch.stack([p[:, [0, 1]], p[:, [0, 2]], p[:, [1, 2]]])[:, :, None]
    found = F.grid_sample(planes, where, align_corners=True, padding_mode="border")[..., 0].sum(0).T
    return linear(F.relu(linear(found, "net.0")), "net.2")
""",
}
PICTURE = """
size, samples, distance, fovy = 64, 12, 2.2, 47.5  # a camera on the x axis, z up
f = 0.5 * size / np.tan(np.radians(fovy) / 2)
v, u = torch.meshgrid(*[torch.arange(size) + 0.5 - size / 2] * 2, indexing="ij")
way = F.normalize(torch.stack([-torch.ones_like(u), u / f, -v / f], -1), dim=-1)
step = 2.6 / samples
along = distance - 1.3 + step * (torch.arange(samples) + 0.5)
p = torch.tensor([distance, 0.0, 0.0]) + along[:, None] * way[..., None, :]
found = values(p.view(-1, 3)).view(size, size, samples, 4)
density = F.softplus(found[..., 0] + 10 * (1 - p.norm(dim=-1) / 0.5)) * (p.abs() <= 1).all(-1)
alpha = 1 - torch.exp(-density * step)
left = torch.cat([torch.ones_like(alpha[..., :1]), (1 - alpha).cumprod(-1)], -1)
image = ((alpha * left[..., :-1])[..., None] * found[..., 1:].sigmoid()).sum(-2) + 0.5 * left[..., -1:]
Image.fromarray((image.clamp(0, 1) * 255).round().byte().numpy()).save(out)
"""
LOADERS = {kind: TEXT + field + PICTURE for kind, field in FIELD.items()}
