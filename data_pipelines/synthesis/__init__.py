"""Synthetic speech: texts and a text-to-speech engine become a corpus folder; see README.md."""
