"""The types of issue that an audit finds: severity, title and meaning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SEVERITIES = ("error", "warning", "info")  # worst first


@dataclass(frozen=True, slots=True)
class IssueType:
    """One type of issue: its severity, its title, and its meaning for somebody who sees it for the first time."""

    severity: str
    title: str
    meaning: str


ISSUE_TYPES: Mapping[str, IssueType] = {
    "empty_file": IssueType(
        "error", "Empty files", "The file has no content: a download or a copy was interrupted. Copy it again."
    ),
    "truncated": IssueType("error", "Truncated files", "The file is cut off. Copy it again."),
    "too_large": IssueType(
        "error",
        "Files above the limits",
        "A small file can claim to be a huge image, so sizes are checked before decoding. If these files are "
        "genuine, raise data.limits.max_pixels or data.limits.max_bytes.",
    ),
    "not_an_image": IssueType(
        "error",
        "Not images",
        "The file has the name of an image, but its content is none of the allowed formats (data.limits.formats).",
    ),
    "corrupt": IssueType(
        "error", "Damaged files", "The file looks like an image but cannot be decoded. Copy it again."
    ),
    "no_permission": IssueType("error", "Files without read permission", "The operating system refuses to open them."),
    "empty_class": IssueType("error", "Empty classes", "These class folders contain no image."),
    "missing_in_train": IssueType(
        "error",
        "Classes without training images",
        "These classes are in a held-out split but not in the train split, so no model can learn them.",
    ),
    "leak": IssueType(
        "error",
        "The same picture in several splits",
        "A model has already seen these images in training, so the scores of the held-out split are too good. "
        "Compare the scores without these images.",
    ),
    "label_conflict": IssueType("error", "The same picture in two classes", "At most one of the labels is right."),
    "wrong_extension": IssueType(
        "warning",
        "Misleading file extensions",
        "The extension names another format than the content. The images are decoded by content; other programs may "
        "refuse them.",
    ),
    "exact_duplicates": IssueType(
        "warning",
        "Identical files",
        "These files of one class and split have the same bytes. They count twice in training, and are always kept in "
        "the same split.",
    ),
    "near_duplicates": IssueType(
        "warning",
        "Near-identical pictures",
        "These images of one class and split differ only in size, compression or small changes (measured by "
        "correlation). They are always kept in the same split.",
    ),
    "tiny": IssueType(
        "warning", "Tiny images", "Much smaller than the rest: probably thumbnails, icons or tracking pixels."
    ),
    "extreme_aspect": IssueType(
        "warning", "Extreme shapes", "Very long images: cropping loses most of them, resizing distorts them."
    ),
    "imbalance": IssueType(
        "warning",
        "Class imbalance",
        "Rare classes will be predicted too rarely. See data.balance, or collect more images of them.",
    ),
    "few_images": IssueType("warning", "Classes with few images", "Too few images for training and for evaluation."),
    "missing_in_test": IssueType(
        "warning", "Classes without held-out images", "These classes are trained but never evaluated."
    ),
    "class_name_variants": IssueType(
        "warning", "Class names that differ only in spelling", "Probably one class: merge them with data.rename."
    ),
    "stray_images": IssueType(
        "warning", "Images outside the classes", "These images are in no class folder and are ignored."
    ),
    "ignored_folders": IssueType(
        "warning", "Folders outside the splits", "These folders are next to train and test and are ignored."
    ),
    "stray_files": IssueType("info", "Other files", "These files do not have the name of an image and are ignored."),
    "cmyk": IssueType("info", "CMYK images", "Colours for print; converted to RGB."),
    "deep_samples": IssueType(
        "info", "Images with high bit depth", "More than 8 bits per channel; scaled to 0..255, not clipped."
    ),
    "palette": IssueType("info", "Palette images", "Pixels refer to a table of colours; converted to RGB."),
    "transparency": IssueType("info", "Transparent images", "Drawn on the colour data.background."),
    "greyscale": IssueType(
        "info",
        "Greyscale images among colour images",
        "Converted to RGB. If one class is greyscale more often than another, a model can learn that instead.",
    ),
    "animation": IssueType("info", "Animations", "Only the first frame is used."),
    "exif_rotation": IssueType("info", "Images rotated by EXIF", "Used upright, as an image viewer shows them."),
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
# Types whose issues are groups of images that show the same.
DUPLICATE_TYPES = ("leak", "label_conflict", "exact_duplicates", "near_duplicates")

# The noun for one issue, for types with several images in one issue.
GROUP_NOUNS = {**dict.fromkeys(DUPLICATE_TYPES, "group"), "few_images": "class", "missing_in_train": "class"}
# The noun for what is counted, for types that do not count images.
NOUNS = {
    "empty_class": "folder",
    "ignored_folders": "folder",
    "stray_files": "file",
    "imbalance": "issue",
    "class_name_variants": "name",
    "missing_in_test": "class",
}
