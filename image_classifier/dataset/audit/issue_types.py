"""The kinds of finding: how bad each is, and what it means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SEVERITIES = ("error", "warning", "info")  # worst first


@dataclass(frozen=True, slots=True)
class IssueType:
    """One kind of finding: how bad it is, its heading, and what it means for a person who has never heard of it."""

    severity: str
    title: str
    meaning: str


KINDS: Mapping[str, IssueType] = {
    "empty_file": IssueType(
        "error", "Empty files", "Files of no bytes: a download or a copy broke off. Get them again."
    ),
    "truncated": IssueType(
        "error",
        "Files cut short",
        "The picture ends before its end; decoded all the same, the rest would be grey. Get them again.",
    ),
    "too_large": IssueType(
        "error",
        "Files above the limits",
        "A few bytes can claim gigapixels, so sizes are checked before decoding. Raise data.limits.max_pixels or .max_bytes if these are honest.",
    ),
    "not_an_image": IssueType(
        "error",
        "Not images",
        "The name promises an image, the content is none of the allowed formats (data.limits.formats).",
    ),
    "corrupt": IssueType("error", "Damaged files", "The file opens as an image and cannot be decoded. Get it again."),
    "no_permission": IssueType("error", "Files that may not be read", "The operating system refuses to open them."),
    "empty_class": IssueType("error", "Empty classes", "Folders that are named like a class and hold no image."),
    "missing_in_train": IssueType(
        "error",
        "Classes without training images",
        "A held-out part shows them and the train part does not: they cannot be learned.",
    ),
    "leak": IssueType(
        "error",
        "The same picture in several parts",
        "A picture that was trained on tells nothing about new ones: figures of the held-out part are flattered. Compare them without these.",
    ),
    "label_conflict": IssueType("error", "The same picture under two labels", "At most one of the labels is right."),
    "wrong_extension": IssueType(
        "warning",
        "Misleading names",
        "The name promises another format than the content; they decode by content. Other programs may refuse them.",
    ),
    "exact_duplicates": IssueType(
        "warning",
        "Identical files",
        "Byte for byte the same, in one class and part. They count twice in training, and stay together when parts are dealt.",
    ),
    "near_duplicates": IssueType(
        "warning",
        "Near-identical pictures",
        "Alike but for size, compression or small changes (by correlation), in one class and part. They stay together when parts are dealt.",
    ),
    "tiny": IssueType(
        "warning",
        "Tiny images",
        "Much smaller than the rest: thumbnails, icons or tracking pixels rather than pictures.",
    ),
    "extreme_aspect": IssueType(
        "warning", "Extreme shapes", "Banners and stripes: cropping loses most of them, squashing distorts them."
    ),
    "imbalance": IssueType(
        "warning",
        "Class imbalance",
        "The rare classes will be predicted too seldom. See data.balance, or gather more of them.",
    ),
    "few_images": IssueType("warning", "Classes with few images", "Too few to learn from, and too few to measure on."),
    "missing_in_test": IssueType(
        "warning", "Classes without held-out images", "They are trained on and never measured."
    ),
    "class_name_variants": IssueType(
        "warning", "Class names that differ by spelling only", "Probably one class: merge them with data.rename."
    ),
    "stray_images": IssueType("warning", "Images outside the classes", "They lie in no class folder and are left out."),
    "ignored_folders": IssueType(
        "warning", "Folders that belong to no part", "They lie beside train and test and are left out."
    ),
    "stray_files": IssueType("info", "Other files", "They are no images by name and are left out."),
    "cmyk": IssueType("info", "CMYK images", "Colours for print; converted to RGB."),
    "deep_samples": IssueType("info", "Deep images", "More than 8 bits a sample; scaled to 0..255, not clipped."),
    "palette": IssueType("info", "Palette images", "Pixels that point into a table of colours; converted to RGB."),
    "transparency": IssueType("info", "Transparent images", "Laid on the colour data.background."),
    "greyscale": IssueType(
        "info",
        "Greyscale images among colour",
        "Converted to RGB. If one class is grey more often than another, a model can learn that instead.",
    ),
    "animation": IssueType("info", "Animations", "The first frame is used."),
    "exif_rotation": IssueType(
        "info", "Images turned by EXIF", "Shown and trained on upright, as a viewer shows them."
    ),
}

UNREADABLE = ("empty_file", "truncated", "too_large", "not_an_image", "corrupt", "no_permission")
EXCLUDABLE = (
    "unreadable",
    *UNREADABLE,
    "exact_duplicates",
    "near_duplicates",
    "label_conflict",
    "leak",
    "tiny",
    "extreme_aspect",
)


ALIKE = ("leak", "label_conflict", "exact_duplicates", "near_duplicates")  # the images of a finding show the same

# What a finding of this kind is, where a kind has many, and what is counted, where that is not images.
GROUPED = {**dict.fromkeys(ALIKE, "group"), "few_images": "class", "missing_in_train": "class"}
NOUNS = {
    "empty_class": "folder",
    "ignored_folders": "folder",
    "stray_files": "file",
    "imbalance": "finding",
    "class_name_variants": "name",
    "missing_in_test": "class",
}
