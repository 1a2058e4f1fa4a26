"""Data: records, video decoding and the embedded "needle in a film" task."""
