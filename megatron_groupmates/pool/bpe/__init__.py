"""Byte-level BPE as fast as can be, with ids proven equal to those of Hugging Face."""
