"""Getting what lies elsewhere: archives, downloads, hubs, DVC; resumable, compared with checksums, whole or not at all."""
