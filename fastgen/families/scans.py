"""Networks that complete scans: a point cloud as x0, a sparse one as the condition."""

from fastgen.diffusion.schedules import VP, LocalVP, Schedule
from fastgen.families.base import Family
from fastgen.families.parts import DiffusersModel


class PointVoxel(Family):
    """Our PointVoxelModel: x is [B, N, 3], how far points have moved from the scan they start at (LiDiff)."""

    name, net_class, component, kind = "point-voxel", "PointVoxelModel", "unet", "scans"
    schedules, has_size, factor = ("VP",), False, 1
    sample_key, keys = "sample", ("start", "scan")
    lora_targets = ("point_in.0", "point_in.2", "point_mid", "point_mid2", "conv", "conv2", "skip", "narrow")
    final_layers = ("time_embedding.*", "conv_in", "conv_out", "point_time")
    input_layer = ""
    lora_loader = takes_text = False

    def noised(self, schedule: Schedule, net: DiffusersModel) -> Schedule:
        if isinstance(schedule, VP) and net.config.formulation == "local":
            return LocalVP.around(schedule)
        return schedule

    def channels(self, net: DiffusersModel) -> int:
        return net.config.num_points

    def grid(self, net: DiffusersModel) -> tuple[int, ...]:
        return (3,)

    def cond_shapes(self, net: DiffusersModel, codec) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(self.keys, (net.config.scan_points, 3))

    def taps(self, net: DiffusersModel):
        return [*net.blocks, net.last]

    def feature_map(self, net: DiffusersModel, out, x):
        return out.flatten(3)  # height beside depth

    def feature_channels(self, net: DiffusersModel) -> list[int]:
        width = net.config.width
        return [2 * width] * len(net.blocks) + [width]


FAMILIES: tuple[Family, ...] = (PointVoxel(),)
