"""Fused attention kernels in Pallas, usable without Flax: `pallas_kernels.flash` and `decode`."""
