"""UNet families at tiny size."""

from tests.families import Case
from tests.tiny import sana_folder, sd_folder, vp_folder

CASES = [
    Case("sd", sd_folder, name="sd"),
    Case("unet2d", vp_folder, name="unet2d"),
    Case("sana", sana_folder),
]
