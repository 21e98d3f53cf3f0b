"""The flags of commands that measure, as encoders and as the material of metrics."""

from pathlib import Path


def at_least(args, **least: int) -> None:
    """Refuse flags below their smallest value."""
    from fastgen.core.errors import UserError

    for name, lowest in least.items():
        if getattr(args, name) < lowest:
            raise UserError(f"--{name}", f"found {getattr(args, name)}", f"give {lowest} or more")


def open_encoders(args):
    """Encoders by the flags --weights, --extractor, --clip and --device."""
    from fastgen.data.bundled import NAMES
    from fastgen.evaluation.encoders.catalogue import Encoders, read_weights
    from fastgen.networks.device import open_device

    mini_set = args.extractor or (args.against if args.against in NAMES else "")
    return Encoders(read_weights(args.weights), mini_set, args.clip, open_device(args.device))


def open_material(args, asked):
    """Samples, reference, prompts and encoders of the command line, as the metrics that are asked need them:
    images, or clips, clouds, points; labels where a metric asks for them.
    """
    from fastgen.core.paths import is_analytic
    from fastgen.evaluation.features import holds_images, is_statistics
    from fastgen.evaluation.inputs import open_source
    from fastgen.evaluation.material import Material
    from fastgen.evaluation.prompts import labels_of, prompts_of
    from fastgen.evaluation.registry import kind_of
    from fastgen.evaluation.sources import Folder, Squared

    kind = kind_of(asked)
    at_least(args, group_size=0)
    source, encoders = open_source(args.images, kind=kind), open_encoders(args)
    if num := getattr(args, "first", 0):
        assert isinstance(source, Folder), "what a model has drawn"
        source = source.first(num)
    prompts = prompts_of(source, args.prompts, args.group_size)
    resolution = getattr(args, "resolution", 0)
    known = Path(args.against) if args.against and is_statistics(Path(args.against)) else None
    against = mixture = None
    if is_analytic(args.against):
        against, mixture = _exact(args.against)
    elif args.against and (known is None or holds_images(known)):
        against = open_source(args.against, "--against", kind=kind)
    if resolution:
        source, against = Squared(source, resolution), against and Squared(against, resolution)
    labelled = any("labels" in w.metric.needs for w in asked)
    labels = labels_of(source, prompts, encoders.mini_set) if labelled else {}
    cache = Path(args.cache) if args.cache else None
    material = Material(source, encoders, against, known, prompts, labels, args.group_size, cache)
    material.mixture, material.forgotten = mixture, getattr(args, "forgotten", -1)
    material.equal_counts = getattr(args, "equal_counts", True)
    return material


def _exact(spec: str):
    """(draws of an analytic teacher, its mixture)."""
    from fastgen.evaluation.metrics.mixtures import draws
    from fastgen.networks.load import load_teacher

    mixture = load_teacher(spec).backbone
    return draws(mixture, spec, "--against"), mixture
