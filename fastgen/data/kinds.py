"""The keys of a data section that name what it reads."""

OWN = ("images", "table", "dataset", "shards")
"""sources of a user's pictures"""
PICTURES = ("name", *OWN, "latents", "scans")
"""sources that hold pictures, or scans with what they are completed to"""
SOURCES = (*PICTURES, "prompts")
"""of which a section gives one"""


def kind_of_source(section) -> str:
    """The source of a user's pictures that a section gives, or an empty text."""
    return next((key for key in OWN if getattr(section, key)), "")


def own_source(data) -> str:
    """The source that a data section gives if it is the user's own, or an empty text."""
    return next((key for key in SOURCES if key != "name" and getattr(data, key)), "")
