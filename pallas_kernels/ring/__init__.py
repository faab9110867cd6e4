"""Flash attention that sends on what it reads: one hop of a ring of devices, forward and backward.

`plan.Ring` says who sends to whom; `tpu` has the bodies, those of `pallas_kernels.flash.tpu` with
remote copies beside them.  `attnlab.distributed.remote` goes round the ring with them; nothing here
needs attnlab or Flax.  Within `jax.shard_map` over the ring's axis:

    ring = plan.Ring("ring", size=4)
    out, lse, (key, value) = tpu.forward(spec, arrays, ring)   # keys of the device before this one
"""
