"""Flash attention whose masks, modifiers and normalizers are the caller's code.

A call is a `problem.Spec` (what is static), `problem.Arrays` and a `problem.Program` (the caller's
code on a tile); `plan` says which tiles are visited; `triton`, `mosaic_gpu` and `tpu` hold the
bodies, each with `forward` and `backward`.  `attnlab.attention` writes problems from its masks,
modifiers and normalizers; nothing here needs attnlab or Flax:

    class Relu2:                                    # weights relu(s)^2, keys up to the query
        shared = False

        def allowed(self, leaves, at):
            return at.key <= at.query

        def evaluate(self, leaves, products, at):
            return jnp.square(jnp.maximum(products - leaves[0] * (at.query - at.key), 0))

    spec = Spec(Relu2(), (Leaf("n", trainable=True),), scale, (T, S), (64, 64))
    live = numpy.tril(numpy.ones((1, 1, T // 64, S // 64), bool))
    full = numpy.tril(live, -1)
    arrays = Arrays(query, key, value, [slopes], plan.make_lists(live, full))
    out, _ = triton.forward(spec, arrays)           # "1 B N T D"; interpret=True without a GPU
"""
