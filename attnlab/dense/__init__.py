"""Attention as first written, and the same computed with less memory."""
