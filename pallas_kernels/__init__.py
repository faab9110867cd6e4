"""Fused attention kernels in Pallas, usable without Flax: `flash`, `linear` and `decode`."""
